"The comparison as a whole: the same again for the same seed, taken up where it stopped, nothing lost on a full disk, a report that needs no network."
import copy, errno, itertools, json, math, re
from dataclasses import replace
from html.parser import HTMLParser

import pytest, torch

import peftbook.compare as C
from peftbook.cli import main
from peftbook.compare import *
from peftbook.core import methods
from peftbook.data import Task
from peftbook.evaluation import base_texts, bootstrap
from peftbook.models import load_model

trained = [m for m in lecture if m != 'soft_prompting']
rows = [dict(prompt=f'Say {i}.', completion=f'It is {i}.') for i in range(30)]
def exact(row, reply): return float(reply == row['completion'])
def task(score=exact, **kw): return replace(Task('say', rows[:22], [], rows[22:], score, 'Say the number that you are given, and nothing else.', rows[:2]), **kw)
small = Size(steps=2, test=4, texts=2, others=1, attacked=2)
tiny = dict(size=small, model='tiny:llama')

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The results of all methods, and the folder."
    d = tmp_path_factory.mktemp('whole')/'results'
    return compare([task()], d, **tiny), d

def numbers(results):
    "What must be equal for equal seeds: all but what a clock or an allocator says."
    keep = lambda r: dict(test=r['test'], texts=r['texts'], others=r['others'], injection=r['injection'], losses=r['training']['losses'], settings=r['settings'])
    return json.loads(json.dumps([keep(r) for r in results]))

# --- runs

def test_all_methods_and_the_base_are_there(whole):
    results, folder = whole
    assert [r['settings']['method'] for r in results] == ['base', *lecture]
    assert len(list(folder.iterdir())) == 8 and not [f for f in folder.iterdir() if f.name.startswith('.')]
    for r in results:
        assert len(r['training']['losses']) == (2 if r['settings']['method'] in trained else 0)
        assert math.isfinite(r['test']['loss'][0]) and r['cost']['peak'] > 0 and min(r['latency'].values()) > 0

def test_same_seed_same_numbers(whole, tmp_path):
    "Two runs from nothing, in two folders."
    again = compare([task()], tmp_path/'r', **tiny)
    assert numbers(again) == numbers(whole[0])

def test_a_part_alone_gives_the_numbers_of_the_whole(whole, tmp_path):
    "No method sees what another did to the base before it; the base is always measured too."
    part = compare([task()], tmp_path/'r', ['lora', 'qlora'], **tiny)
    assert [r['settings']['method'] for r in part] == ['base', 'lora', 'qlora']
    assert numbers(part) == [n for n in numbers(whole[0]) if n['settings']['method'] in ('base', 'lora', 'qlora')]

def test_another_seed_gives_other_numbers_and_the_base_has_one_run(tmp_path):
    res = compare([task()], tmp_path/'r', ['lora'], seeds=2, **tiny)
    assert [(r['settings']['method'], r['settings']['seed']) for r in res] == [('base', 0), ('lora', 0), ('lora', 1)]
    assert res[1]['training']['losses'] != res[2]['training']['losses'] and res[1]['test']['tokens'] == res[2]['test']['tokens']
    assert summaries(res)['say', 'lora']['seeds'] == 2

@pytest.mark.parametrize('method', ['base', *lecture])
def test_the_base_is_left_as_it_was(method):
    model, tok = C._Bases('tiny:llama').get(method)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    run_one(method, task(), model, tok, small, base_texts(model, tok, n=2, length=6), {})
    now = model.state_dict()
    assert getattr(model, 'tuner', None) is None and now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items())

def test_a_run_that_fails_leaves_the_base(monkeypatch):
    model, tok = load_model('tiny:llama')
    before = {n: t.clone() for n, t in model.state_dict().items()}
    def broken(*a, **kw): raise ValueError('no')
    monkeypatch.setattr(C, 'measure', broken)
    with pytest.raises(ValueError): run_one('full', task(), model, tok, small, base_texts(model, tok, n=2, length=6), {})
    assert getattr(model, 'tuner', None) is None and all(torch.equal(model.state_dict()[n], t) for n, t in before.items())

def test_rows_are_the_same_for_all_methods(whole):
    "Same rows, texts and attacked requests, so that differences are the methods'."
    tests = [r['test']['tokens'] for r in whole[0]]
    texts = [[x['tokens'] for x in r['texts']['rows']] for r in whole[0]]
    asked = [[t['request'] for t in r['injection']['replies']] for r in whole[0]]
    assert all(o == tests[0] for o in tests) and all(o == texts[0] for o in texts) and all(o == asked[0] for o in asked)

def test_peak_memory_orders_what_must_be_ordered():
    "Full fine-tuning holds gradients and two means of every number beside the weights; a LoRA those of its own."
    model, tok = load_model('tiny:llama', dtype=torch.float32)
    n = sum(p.numel() for p in model.parameters())
    peak = {m: peak_memory(model, tok, task(), lambda: make_tuner(m, task())) for m in ('base', 'lora', 'full')}
    assert 4*n < peak['base'] < peak['lora'] < peak['full']
    assert peak['full'] - peak['lora'] > 2.5*4*n # three more copies of all numbers, less LoRA's own

# --- never twice, never lost

def count_runs(monkeypatch, stop_at=None, error=KeyboardInterrupt):
    "Count the runs that are made; raise in place of the run number `stop_at`."
    made, real = [], C.run_one
    def run(method, *a, **kw):
        if len(made) == stop_at: raise error
        made.append(method)
        return real(method, *a, **kw)
    monkeypatch.setattr(C, 'run_one', run)
    return made

def test_finished_runs_are_not_made_again(whole, monkeypatch, capsys):
    made = count_runs(monkeypatch)
    assert compare([task()], whole[1], **tiny) == whole[0] and made == []
    assert '8 of 8 runs are finished already' in capsys.readouterr().out

def test_an_interrupted_comparison_goes_on(whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        count_runs(m, stop_at=3)
        with pytest.raises(KeyboardInterrupt, match=r'3 of 8 runs are finished and kept in .*: the same command goes on'): compare([task()], tmp_path/'r', **tiny)
    assert len(list((tmp_path/'r').iterdir())) == 3
    made = count_runs(monkeypatch)
    assert numbers(compare([task()], tmp_path/'r', **tiny)) == numbers(whole[0]) and made == list(lecture)[2:]
    assert '3 of 8 runs are finished already' in capsys.readouterr().out

def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    real = C.write_atomic
    def write(path, data):
        if '-lora-' in path.name: raise OSError(errno.ENOSPC, 'No space left on device; nothing was written', str(path))
        real(path, data)
    monkeypatch.setattr(C, 'write_atomic', write)
    with pytest.raises(OSError, match='No space left .*1 of 2 runs are finished and kept') as e: compare([task()], tmp_path/'r', ['lora'], **tiny)
    assert e.value.errno == errno.ENOSPC and [f.name[:8] for f in (tmp_path/'r').iterdir()] == ['say-base']

def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch):
    made = count_runs(monkeypatch)
    (tmp_path/'file').write_text('')
    with pytest.raises(FileExistsError, match='is a file'): compare([task()], tmp_path/'file', **tiny)
    with pytest.raises(OSError): compare([task()], tmp_path/'file'/'r', **tiny)
    assert not made

def test_settings_tell_runs_apart(monkeypatch):
    model, _ = load_model('tiny:llama')
    def key(method='lora', t=task(), seed=0, size=small): return result_path('r', settings_of(method, t, seed, size, model)).name
    other = [task(test=rows[20:]), task(train=rows[:20]), task(instruction='Say it.')]
    names = [key(), key('qlora'), key(seed=1), key(size=replace(small, steps=3)), key(size=replace(small, attacked=3)), *(key(t=t) for t in other)]
    assert len(set(names)) == len(names) and key() == names[0]
    with monkeypatch.context() as m:
        m.setattr(methods['lora'], 'lr', .5)
        assert key() not in names
    monkeypatch.setattr(C, 'module_hash', lambda m: 'changed' if m == 'lora' else 'same')
    a, b = key(), key('qlora')
    monkeypatch.setattr(C, 'module_hash', lambda m: 'same')
    assert key() != a and key('qlora') != b # QLoRA is made of LoRA
    assert key('full') == key('full')

def test_the_base_of_another_dtype_or_seed_is_another_base():
    a, b = [load_model('tiny:llama', dtype=t)[0] for t in (torch.float32, torch.bfloat16)]
    c = load_model('tiny:llama:1', dtype=torch.float32)[0]
    assert len({result_path('r', settings_of('lora', task(), 0, small, m)) for m in (a, b, c)}) == 3

def test_task_names_make_plain_file_names():
    assert result_path('r', dict(task='../my task', method='lora', seed=0)).name.startswith('_my_task-lora-0-')

def test_damaged_and_foreign_files_are_named(whole, tmp_path):
    (tmp_path/'x.json').write_bytes(next(whole[1].iterdir()).read_bytes()[:-3])
    with pytest.raises(ValueError, match='x.json is damaged'): read_results(tmp_path)
    (tmp_path/'x.json').write_text('[]')
    with pytest.raises(ValueError, match='x.json is no result'): read_results(tmp_path)
    assert read_results(tmp_path/'nonesuch') == []

def test_a_damaged_result_is_named_before_anything_is_lost(whole, tmp_path):
    import shutil
    shutil.copytree(whole[1], tmp_path/'r')
    f = next((tmp_path/'r').glob('say-lora-*'))
    f.write_bytes(b'{')
    with pytest.raises(ValueError, match='say-lora-.* is damaged .*delete it'): compare([task()], tmp_path/'r', **tiny)

def test_kept_replies_are_scored_again(whole):
    half = task(score=lambda row, reply: .5)
    assert {r['test']['score'][0] for r in rescored(whole[0], [half])} == {.5} and rescored(whole[0], [task(test=rows[20:])]) == []

# --- what is refused

@pytest.mark.parametrize('kw,says', [(dict(names=['magic']), 'unknown method .magic.; there are base, '), (dict(seeds=0), 'seeds=0'), (dict(model='nonesuch'), 'no model folder'),
    (dict(tasks=[task(), task()]), 'two tasks of one name'), (dict(tasks=[task(test=rows[:1])]), '1 rows, an interval needs 2'),
    (dict(tasks=[task(score=lambda row, reply: .1)]), '0.3 or less to the right replies')])
def test_refused(kw, says, tmp_path):
    kw = dict(tasks=[task()], names=['lora'], **tiny) | kw
    with pytest.raises((ValueError, OSError), match=says): compare(folder=tmp_path/'r', **kw)

@pytest.mark.parametrize('kw', [dict(test=1), dict(attacked=1), dict(texts=0), dict(steps=0), dict(others=0), dict(test=None), dict(steps=2.5)])
def test_sizes_of_nonsense(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): Size(**kw)

def test_own_number_of_steps():
    model, _ = load_model('tiny:llama')
    assert {m: settings_of(m, task(), 0, replace(small, steps=None), model)['steps'] for m in trained} == {m: methods[m].steps for m in trained}
    assert all(s.steps <= 75 for s in sizes.values()) and sizes['quick'].steps <= 40 # the minutes that the README and the chapter promise hang on it

# --- the rule

def test_verdict_against_a_count_by_hand():
    "All orders of five methods, two of which share a word, with ties of ours."
    said = dict(zip('abcde', (0, 1, 1, 2, 3)))
    for ours in itertools.product(range(3), repeat=5):
        v = dict(zip('abcde', ours))
        for m in said:
            pairs = [o for o in said if said[o] != said[m] and v[o] != v[m]]
            same = len([o for o in pairs if (v[o] < v[m]) == (said[o] < said[m])])
            want = 'undecided' if not pairs else 'agrees' if same/len(pairs) > .6666 else 'disagrees' if same/len(pairs) < .3334 else 'partly'
            assert verdict(m, said, lambda a, b: (v[a] > v[b]) - (v[a] < v[b])) == (want, same, len(pairs))

def invented(whole, effect, cost):
    "The results with the figures of the methods replaced: score and cost follow the numbers given."
    out = copy.deepcopy(whole)
    for r in out:
        m = r['settings']['method']
        if m == 'base': continue
        r['test']['scores'] = [effect[m]/10 + d for d in (-.01, 0, .01, 0)]
        r['test']['score'] = [effect[m]/10]*3
        r['cost'] |= dict(trained=cost[m], bytes=cost[m], peak=1000 + cost[m])
        r['training'] = dict(losses=[1.], seconds=[float(cost[m])])
    return out

def test_a_world_like_the_lecture_agrees_everywhere_and_its_mirror_nowhere(whole):
    effect = {m: C._place(lecture[m][3]) for m in lecture}
    cost = {m: 5 - C._place(lecture[m][2]) for m in lecture}
    like = lecture_cells(invented(whole[0], effect, cost))
    assert {c['verdict'] for cs in like.values() for c in cs.values()} == {'agrees'}
    mirror = lecture_cells(invented(whole[0], {m: 5 - v for m, v in effect.items()}, {m: 5 - v for m, v in cost.items()}))
    assert {c['verdict'] for cs in mirror.values() for k, c in cs.items() if k != 'alteration'} == {'disagrees'}
    for r, (m, cs) in zip(lecture_table(like).rows, like.items()): assert lecture[m][0] in r[0] and r[1:] and all(w in c for w, c in zip(lecture[m][1:], r[1:]))

def test_differences_within_chance_decide_nothing(whole):
    same = lecture_cells(invented(whole[0], dict.fromkeys(lecture, 3), dict.fromkeys(lecture, 3)))
    assert {cs[k]['verdict'] for cs in same.values() for k in ('efficiency', 'effectiveness')} == {'undecided'}

def test_every_disagreement_with_a_known_reason_is_explained(whole):
    cells = lecture_cells(whole[0])
    for cs in cells.values():
        for c in cs.values(): c['verdict'] = 'disagrees'
    said = limits_of(whole[0], cells)
    assert any('10 billion' in s for s in said) and any('one seed' in s for s in said) and any('2 of 300' in s for s in said)
    for cs in cells.values():
        for c in cs.values(): c['verdict'] = 'agrees'
    assert not any('10 billion' in s for s in limits_of(whole[0], cells))

def test_intervals_over_seeds_hold_those_of_rows(tmp_path):
    res = compare([task()], tmp_path/'r', ['prompt_tuning'], seeds=3, **tiny)
    s = summaries(res)['say', 'prompt_tuning']
    losses, tokens = [r['test']['losses'] for r in res[1:]], [r['test']['tokens'] for r in res[1:]]
    assert s['loss'][0] == pytest.approx(sum(map(sum, losses))/sum(map(sum, tokens))) and s['loss'] == pytest.approx(bootstrap(losses, tokens))

def test_results_of_several_sizes_are_not_mixed(whole, tmp_path):
    longer = compare([task()], tmp_path/'r', ['lora'], size=replace(small, test=5), model='tiny:llama')
    newest = pooled([*whole[0], *longer])['say', 'lora']
    assert len(newest) == 1 and len(newest[0]['test']['losses']) == 5

def test_seconds_to_a_loss_never_counts_what_came_after():
    for losses in ([5, 4, 3, 2, 1], [1, 5, 5, 5, 5], [3, 3, 3]):
        got = seconds_to(losses, [1]*len(losses), 2.5, over=2)
        means = [(losses[i] + losses[i+1])/2 for i in range(len(losses) - 1)]
        assert got == next((i + 2 for i, m in enumerate(means) if m <= 2.5), None)

# --- a task without a scorer

def test_without_a_scorer_the_loss_is_compared(tmp_path):
    res = compare([task(score=None)], tmp_path/'r', ['lora', 'prompt_tuning'], **tiny)
    assert all(r['test']['score'] is None and r['injection'] is None and r['test']['replies'] == [] for r in res)
    page = write_report(res, [task(score=None)], tmp_path/'report').read_text()
    assert lecture_cells(res)['lora']['effectiveness']['ours'].startswith('loss ') and 'LoRA' in page

# --- the report

class Page(HTMLParser):
    "Checks that elements close in order; gathers text and what would be fetched."
    void = {'meta', 'br', 'path', 'use', 'rect', 'line', 'img'}
    def __init__(self):
        super().__init__(); self.open, self.fetched, self.text = [], [], []
    def handle_starttag(self, tag, attrs):
        if tag not in self.void: self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ('src', 'href', 'xlink:href', 'data', 'srcset') and not v.startswith('#')] + [tag]*(tag in ('script', 'link', 'iframe'))
    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void: self.open.pop()
    def handle_endtag(self, tag):
        if tag in self.void: return
        assert self.open.pop() == tag, tag
    def handle_data(self, data): self.text.append(data)

def test_report_opens_offline_on_light_and_dark(whole, tmp_path):
    out = tmp_path/'report'
    html = write_report(whole[0], [task()], out, 'peftbook compare --task "a & b"').read_text(encoding='utf-8')
    page = Page(); page.feed(html)
    assert page.open == [] and page.fetched == [] and not re.search(r'url\((?!#)|@import|https?://(?!www\.w3\.org)', html)
    assert 'color-scheme:light dark' in html and 'prefers-color-scheme:dark' in html and html.count('<svg') == 3 and "#010203" not in html and 'currentColor' in html
    text = ' '.join(page.text)
    for m in lecture: assert lecture[m][0] in text
    assert 'peftbook compare --task "a & b"' in text and "The lecture's table" in text and text.index('The figures') < text.index("The lecture's table")
    assert sorted(f.name for f in (out/'figures').iterdir()) == ['learning_forgetting.svg', 'memory.svg', 'score_numbers.svg']

def test_results_json_says_where_the_numbers_are_from(whole, tmp_path):
    write_report(whole[0], [task()], tmp_path, 'peftbook compare')
    data = json.loads((tmp_path/'results.json').read_text())
    assert data['command'] == 'peftbook compare' and data['seeds'] == [0] and 'torch' in data['versions'] and data['devices'] and len(data['results']) == 8
    assert [r['method'] for r in data['table']] == ['base', *lecture] and set(data['lecture']) == set(lecture)

def test_replies_cannot_write_into_the_page(whole, tmp_path):
    evil = copy.deepcopy(whole[0])
    for r in evil: r['test']['replies'][0] = '<script>alert(1)</script> | x'
    html = write_report(evil, [task()], tmp_path).read_text()
    assert '<script' not in html and '&lt;script&gt;' in html

def test_a_report_is_the_same_for_the_same_results(whole, tmp_path):
    a, b = (write_report(whole[0], [task()], tmp_path/d, 'x').read_text() for d in 'ab')
    assert a == b

def test_one_request_is_answered_by_all(whole):
    t = answers_table(whole[0], [task()])
    assert [r[1] for r in t.rows] == ['<i>request</i>', '<i>right reply</i>', 'Untuned base', *(lecture[m][0] for m in lecture)] and rows[22]['prompt'] in t.rows[0][2]

# --- the full run

def test_missing_runs_are_those_of_the_full_run(monkeypatch):
    monkeypatch.setattr(C, 'scenarios', dict(airline=None, other=None))
    all_of = missing_runs([])
    assert len(all_of) == (1 + 3*7) + (1 + 7) and all_of[0] == ('airline', 'base', 0)
    def r(**kw): return dict(settings=dict(task='airline', method='lora', seed=0, size=json.loads(json.dumps(vars(sizes['full']))), code=C._code('lora')) | kw)
    assert set(all_of) - set(missing_runs([r()])) == {('airline', 'lora', 0)}
    assert missing_runs([r(size=vars(sizes['quick'])), r(code=dict(lora='old'))]) == all_of
    monkeypatch.setitem(C.full_steps, 'airline', 76)
    assert missing_runs([r()]) == all_of

# --- the shell

@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    "Runs words in a folder with a file of rows; returns the exit code, what was printed, and what was said of errors."
    (tmp_path/'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    def run(*words):
        code = main(['compare', *words])
        out, err = capsys.readouterr()
        return code, out, err
    return run

quick = '--data rows.jsonl --model tiny:llama --quick --steps 1 --methods lora soft_prompting'.split()

def test_compare_from_the_shell(shell, tmp_path):
    code, out, err = shell(*quick)
    lines = [o for o in out.splitlines() if o.startswith('[')]
    assert code == 0 and len(lines) == 3 and 'min left' in lines[0] and 'min left' not in lines[-1] and 'report/index.html' in out
    data = json.loads((tmp_path/'report'/'results.json').read_text())
    assert data['command'].startswith('peftbook compare --data rows.jsonl') and {r['settings']['size']['test'] for r in data['results']} == {sizes['quick'].test}
    again, out, _ = shell(*quick)
    assert again == 0 and '3 of 3 runs are finished already' in out

@pytest.mark.parametrize('words,says', [('--task airline trains', "no task 'trains'; there are airline"), ('--methods magic --task airline', 'unknown method'), ('--steps 0', 'no whole number'),
    ('--data nonesuch.jsonl', 'nonesuch.jsonl'), ('--model nonesuch', 'no model folder'), ('--seeds 0', 'no whole number'), ('--out rows.jsonl', 'rows.jsonl')])
def test_refused_in_a_line(shell, words, says):
    code, _, err = shell(*words.split())
    assert code == 2 and says in err.strip().splitlines()[-1] and 'Traceback' not in err

def test_ctrl_c_in_the_shell(shell, monkeypatch):
    count_runs(monkeypatch, stop_at=1)
    code, _, err = shell(*quick)
    assert code == 130 and '1 of 3 runs are finished and kept in report/results' in err.strip().splitlines()[-1]

def test_full_disk_in_the_shell(shell, monkeypatch):
    count_runs(monkeypatch, stop_at=2, error=OSError(errno.ENOSPC, 'No space left on device', 'x'))
    code, _, err = shell(*quick)
    assert code == 2 and 'No space left' in err and '2 of 3 runs are finished and kept' in err.strip().splitlines()[-1]
