"The front page reads what there is: no runs, some, all."
import json
from pathlib import Path
import pytest
from peftbook._dev import page_name, read_nb, settings, source
from peftbook.compare import Size, compare, lecture
from peftbook.costs import look_of, method_picture
from peftbook.scenarios import scenarios

root = Path(__file__).resolve().parent.parent
nbs = root/settings(root)['nbs_path']

def page():
    "What the front page's cells define."
    here = {}
    for c in read_nb(nbs/'index.ipynb')['cells']:
        if c['cell_type'] == 'code' and ('def ' in source(c) or 'from peftbook.compare' in source(c)): exec('\n'.join(source(c).splitlines()[:-1] if 'def ' in source(c) else source(c).splitlines()), here)
    return here

def rows(shown): return [[o.strip() for o in line[1:-1].split('|')] for line in shown.data.splitlines() if line.startswith('|')]

def test_without_runs_it_says_how_to_make_them(tmp_path):
    shown = page()['closing_table'](tmp_path/'none')
    assert [r[0] for r in rows(shown)[2:]] == [o[0] for o in lecture.values()] and 'full_run' in shown.data

def test_with_runs_it_shows_their_figures(tmp_path):
    size = Size(steps=1, test=2, texts=2, others=2, attacked=2)
    res = compare([scenarios['airline']()], tmp_path, ['lora', 'prompt_tuning'], size=size, model='tiny:llama')
    head, _, *body = rows(page()['closing_table'](tmp_path))
    body = {r[0]: dict(zip(head, r)) for r in body}
    lora = next(r for r in res if r['settings']['method'] == 'lora')
    assert body['LoRA']['numbers trained'] == f"{lora['cost']['trained']:,}" and body['LoRA']['Efficiency'].startswith('high (')
    assert body['Prompt tuning']['peak MB'] and body['Full fine-tuning']['score'] == '' and body['QLoRA']['score'] == ''
    (tmp_path/'airline-base-0-00000000.json').write_text('{')
    with pytest.raises(ValueError, match='damaged'): page()['closing_table'](tmp_path)

def test_before_and_after_are_those_of_the_chapter():
    said = page()['saved_answer'](nbs/'21_lora.ipynb').data
    text = (nbs/'21_lora.ipynb').read_text(encoding='utf-8')
    assert all(json.dumps(line.split(':** ')[1], ensure_ascii=False)[1:-1] in text for line in said.splitlines())

def test_the_picture_is_the_chapters():
    drawn = method_picture(*(m for m in lecture)).replace('style="', 'style="color:#1f2933;background:#fff;', 1) # a file has no page to take its ink from
    text = (nbs/'images'/'methods.svg').read_text(encoding='utf-8')
    assert text == drawn + '\n' and all(look_of(m)['color'] in text for m in lecture)
