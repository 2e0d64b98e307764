"Full fine-tuning: what is named trains, the base waits on disk, low precision loses no steps; each of the field's pains by name."
import errno, json, os, random, shutil, signal, subprocess, sys, tempfile, time
from copy import deepcopy
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import peftbook.full as full
from peftbook.core import *
from peftbook.data import Task, collate, encode_rows
import peftbook.full as full
from peftbook.full import Full, RoundingAdam, find_params, snapshot, stochastic_round
from peftbook.lora import LoRA
from peftbook.models import generate, tiny_archs, tiny_model
from peftbook.training import History, fit, training_bytes

ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

def logits(m):
    with torch.no_grad(): return m(input_ids=ids).logits

def moved(model, **kw):
    "A tuner whose weights are off their start."
    t = Full(**kw).attach(model)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in t.params.values(): p += .01*torch.randn(p.shape, generator=g).to(p)
    return t

def bits(model): return {n: t.clone() for n, t in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)

@pytest.fixture
def model(): return tiny_model('llama')[0]

@pytest.fixture
def task():
    rows = [dict(prompt=f'{a} plus {a % 7}', completion=str(a + a % 7)) for a in range(40)]
    return Task('count', rows, rows[:6], rows[:6])

# --- what trains

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('targets', [None, '*layernorm*', ['^(?!.*layernorm).*1', 'bias']])
def test_battery(arch, targets):
    m = tiny_model(arch)[0]
    names = [n for n, _ in m.named_parameters()]
    if targets == '*layernorm*' and not any('layernorm' in n for n in names): targets = '*ln_*' if arch == 'gpt2' else '*layer_norm*'
    if isinstance(targets, list) and not any('bias' in n for n in names): targets = targets[:1]
    assert len(check_tuner(Full(targets=targets), m)) == 9

def test_everything_trains_or_what_is_named(model):
    assert list(find_params(model)) == [n for n, _ in model.named_parameters()]
    last = list(find_params(model, 'model.layers.[1].*'))
    assert last and all(n.startswith('model.layers.1.') for n in last)
    assert list(find_params(model, 'norm.weight')) == ['model.norm.weight']
    assert list(find_params(model, ['^k_proj|q_proj', 'lm_head.weight']))[-1] == 'lm_head.weight'
    biases = find_params(tiny_model('qwen2')[0], 'bias')
    assert len(biases) == 6 and all(n.endswith('.bias') for n in biases)

def test_no_match_names_what_there_is(model):
    "peft#2991, #282: zero matches raise, and nothing trains in silence."
    before = bits(model)
    for bad in ('bias', 'q_pro', ['norm.weight', 'nonesuch*'], '^x'):
        with pytest.raises(ValueError, match='names no parameter; there are .*q_proj.weight') as e: Full(targets=bad).attach(model)
        assert '\n' not in str(e.value)
    assert same(bits(model), before) and not hasattr(model, 'tuner')

def test_only_the_named_move(model, task):
    t = Full(targets='model.layers.1.*').attach(model)
    fit(t, tiny_model('llama')[1], task, steps=3, lr=1e-3)
    now = bits(model)
    t.detach()
    changed = {n for n, p in bits(model).items() if not torch.equal(p, now[n])}
    assert changed == set(t.params)

def test_integers_cannot_train(model):
    model.register_parameter('packed', torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(ValueError, match='packed holds torch.uint8.*unquantized'): Full().attach(model)

def test_equals_a_plain_loop(task):
    "Three steps of fit, and three of torch's AdamW on transformers' own loss. Tolerance 1e-5."
    ours, tok = tiny_model('llama')
    t = Full().attach(ours)
    fit(t, tok, task, steps=3, lr=1e-3, batch_size=40, warmup=0, schedule='constant', clip=None)
    theirs, _ = tiny_model('llama')
    opt = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.)
    batch = collate(encode_rows(tok, task.train)[0], tok.pad_token_id)
    for _ in range(3):
        opt.zero_grad()
        theirs(**batch, use_cache=False).loss.backward()
        opt.step()
    assert max((p - q).abs().max() for p, q in zip(ours.parameters(), theirs.parameters())) < 1e-5

# --- the base

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_detach_restores_bit_for_bit(arch, dtype):
    model = tiny_model(arch, dtype=dtype)[0]
    objects, before, start = dict(model.named_parameters()), bits(model), logits(model)
    t = moved(model)
    tuned = logits(model)
    assert not torch.equal(tuned, start)
    with t.disabled(): assert torch.equal(logits(model), start) and same(bits(model), before)
    assert torch.equal(logits(model), tuned)
    t.detach()
    assert same(bits(model), before) and all(p is objects[n] and p.requires_grad for n, p in model.named_parameters())
    t.attach(model)
    assert torch.equal(logits(model), tuned)

def test_tied_stays_tied():
    "peft#2018: a matrix that is embedding and head trains once, is stored once and comes back once."
    model = tiny_model('qwen2')[0]
    def tied(): return model.lm_head.weight is model.model.embed_tokens.weight
    assert tied() and list(find_params(model, 'lm_head.weight')) == ['model.embed_tokens.weight']
    t = moved(model)
    assert tied() and 'lm_head.weight' not in t.params
    with t.disabled(): assert tied()
    t.merge()
    assert tied()

@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='reads /proc')
def test_base_waits_on_disk_and_leaves_nothing(model, tmp_path, monkeypatch):
    "Memory-mapped, from a file that has no name any more: even a killed process leaves nothing behind."
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    t = moved(model)
    def maps(): return [l for l in Path('/proc/self/maps').read_text().splitlines() if str(tmp_path) in l]
    where = t._edits[0].base['model.norm.weight'].data_ptr()
    assert any(int(a, 16) <= where < int(b, 16) for a, b in (l.split()[0].split('-') for l in maps()))
    assert os.listdir(tmp_path) == []
    t.merge()
    assert maps() == []

def test_the_base_may_change_while_the_tuner_is_away(model):
    "Another tuner merged into the detached base is in the base afterwards, as it would be beside LoRA."
    t = moved(model)
    tuned = logits(model)
    t.detach()
    lora = LoRA().attach(model)
    for p in lora.params.values(): torch.nn.init.normal_(p, std=.1)
    lora.merge()
    base = logits(model)
    t.attach(model)
    assert torch.equal(logits(model), tuned)
    t.detach()
    assert torch.equal(logits(model), base)

@pytest.mark.parametrize('how', ['little', 'filling'])
def test_full_disk_changes_nothing(model, monkeypatch, how):
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    if how == 'little': monkeypatch.setattr(full.shutil, 'disk_usage', lambda d: shutil._ntuple_diskusage(9, 9, 0))
    else:
        def fsync(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match='No space left on device: keeping the base takes .* GB; nothing was changed; let TMPDIR') as e: Full().attach(model)
    assert e.value.errno == errno.ENOSPC and not hasattr(model, 'tuner') and same(bits(model), before)
    assert flags == [p.requires_grad for p in model.parameters()]
    monkeypatch.undo()
    check_tuner(Full(), model)

def test_follows_the_precision_of_the_model(model):
    t = moved(model)
    model.bfloat16()
    with t.disabled(): assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and logits(model).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

def test_cost_counts_on_the_base_and_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(full, 'snapshot', lambda t: pytest.fail('it wrote the base to disk'))
    n = sum(p.numel() for p in model.parameters())
    want = dict(trained=n, base=n, share=1., bytes=4*n, layers=1)
    assert Full().cost(model) == want and Full(delta=True).cost(model) == want | dict(bytes=2*n)
    monkeypatch.undo()
    t = Full().attach(model)
    assert t.cost() == want
    with t.disabled(): assert t.cost() == want
    assert t.detach().cost() == want and '100.000%' in t._repr_markdown_()

def test_fingerprint_is_the_bases(model, tmp_path):
    f = fingerprint(model)
    t = moved(model)
    assert fingerprint(model) == f
    t.save(tmp_path)
    t.merge()
    assert fingerprint(model) != f                                # merged it is another model
    with pytest.raises(ValueError, match='another base'): Tuner.load(tmp_path, model)

# --- files

@pytest.mark.parametrize('arch', tiny_archs)
def test_loaded_equals_saved(arch, tmp_path):
    model = tiny_model(arch)[0]
    t = moved(model)
    tuned = logits(model)
    t.save(tmp_path)
    again = Tuner.load(tmp_path, tiny_model(arch)[0])
    assert type(again) is Full and torch.equal(logits(again.model), tuned)
    base = logits(tiny_model(arch)[0])
    assert torch.equal(logits(again.detach()._home), base)

def test_file_holds_what_trains_alone(model, tmp_path):
    "peft#2092, #2898: 4 bytes a number of those named, and nothing of the rest."
    t = moved(model, targets='model.layers.1.*')
    t.save(tmp_path)
    size, n = (tmp_path/'adapter_model.safetensors').stat().st_size, t.cost()['trained']
    assert 4*n < size < 4*n + 200*len(t.params) and set(load_file(tmp_path/'adapter_model.safetensors')) == set(t.params)

def test_missing_keys_raise(model, tmp_path):
    "peft#1932, #2566, #2699: nothing is loaded in silence, and the model keeps its bits."
    for delta in (False, True):
        moved(model, targets='norm.weight', delta=delta).save(tmp_path/f'{delta}')
        model.tuner.detach()
        info = json.loads((tmp_path/f'{delta}'/'tuner.json').read_text())
        info['config']['targets'] = None
        (tmp_path/f'{delta}'/'tuner.json').write_text(json.dumps(info))
        before = bits(model)
        with pytest.raises(ValueError, match='lacks lm_head.weight, .* more: nothing was loaded'): Tuner.load(tmp_path/f'{delta}', model)
        assert same(bits(model), before) and not hasattr(model, 'tuner')

def test_delta_takes_half_and_says_so(model, tmp_path, capfd, monkeypatch):
    t = moved(model, delta=True)
    tuned = {n: p.detach().clone() for n, p in t.params.items()}
    base = {n: p.detach().clone() for n, p in t._edits[0].base.items()}
    t.save(tmp_path)
    n = t.cost()['trained']
    assert (tmp_path/'adapter_model.safetensors').stat().st_size < 2*n + 300*len(tuned)
    again = Tuner.load(tmp_path, tiny_model('llama')[0])
    for k, p in again.params.items():                             # off by half a unit of bf16's eight bits, of the change
        assert ((p - tuned[k]).abs() <= (tuned[k] - base[k]).abs()*2**-8 + 1e-8).all()
    bf16 = Tuner.load(tmp_path, tiny_model('llama', dtype=torch.bfloat16)[0])
    assert {p.dtype for p in bf16.params.values()} == {torch.bfloat16}

def test_delta_of_a_merged_one_raises(model, tmp_path):
    t = moved(model, delta=True)
    t.merge()
    with pytest.raises(ValueError, match='save it before merge'): t.save(tmp_path)
    assert os.listdir(tmp_path) == []

def test_size_is_said_before_it_is_written(tmp_path, capfd, monkeypatch):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(1_000_000))
    model.get_input_embeddings = lambda: torch.nn.Embedding(2000, 1)
    said = []
    monkeypatch.setattr(Tuner, 'save', lambda self, path: said.append(capfd.readouterr().err))
    Full().attach(model).save(tmp_path)
    model.tuner.detach()
    Full(delta=True).attach(model).save(tmp_path)
    assert said[0].startswith('full: writing 1,000,000 weights, 4 MB to')
    assert said[1].startswith('full: writing the change in 1,000,000 weights, 2 MB in bf16 (whole they take 4 MB) to')

def test_merge_keeps_the_weights(model, tmp_path):
    t, objects = moved(model), None
    tuned, now = logits(model), bits(model)
    assert t.merge() == dict(layers=1, max_rounding=0.) == t.merge()
    assert same(bits(model), now) and torch.equal(logits(model), tuned) and not hasattr(model, 'tuner')
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match='load the base again'): t.detach()

def test_copies_are_independent(model):
    t = moved(model)
    tuned = logits(model)
    other = deepcopy(model)
    other.tuner.detach()
    assert not torch.equal(logits(other), tuned) and torch.equal(logits(model), tuned)

# --- low precision

def test_stochastic_rounding_is_right_on_average():
    "A quarter of the way between two neighbours goes up a quarter of the time; neighbours themselves stay."
    def rounded(x, seed=0): return stochastic_round(x, torch.randint(2**16, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32))
    x = torch.full((100_000,), 1 + 2**-7/4)
    r = rounded(x).float()
    assert set(r.tolist()) == {1., 1 + 2**-7} and abs((r > 1).float().mean() - .25) < .01
    x = torch.randn(10_000).bfloat16()
    assert torch.equal(rounded(x.float()), x)
    assert torch.equal(rounded(-torch.ones(9)*1.001, 1), -rounded(torch.ones(9)*1.001, 1))
    assert rounded(torch.tensor([float('inf'), -float('inf')])).tolist() == [float('inf'), -float('inf')]

def test_rounding_adam_is_adamw_in_fp32():
    a = torch.nn.Parameter(torch.randn(50)); b = torch.nn.Parameter(a.detach().clone())
    ours, torchs = RoundingAdam([a], 1e-2), torch.optim.AdamW([b], lr=1e-2, weight_decay=0.)
    for i in range(20):
        a.grad = torch.randn(50, generator=torch.Generator().manual_seed(i)); b.grad = a.grad.clone()
        ours.step(); torchs.step()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

def test_small_steps_are_not_lost_in_bf16():
    "peft#1249's other side: a weight of 1 moved 100 times by 0.001 stays 1 in bf16, unless it is rounded at random."
    ends = []
    for make in (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.), lambda p: RoundingAdam(p, 1e-3)):
        w = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        opt = make([w])
        for _ in range(100): w.grad = torch.ones_like(w); opt.step()
        ends.append(w.float().mean().item())
    assert ends[0] == 1. and abs(ends[1] - .9) < .01

def test_a_step_in_pieces_is_a_step(monkeypatch):
    "Tensors larger than a piece, and no multiple of one, move as they do whole; in fp32 as with torch's AdamW."
    def moved(n, dtype):
        monkeypatch.setitem(full._piece, 'cpu', n)
        ps = [torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)) for shape in ((7, 11), (3,))]
        opt = RoundingAdam(ps, 1e-2)
        for i in range(3):
            for p in ps: p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
            opt.step()
        return ps
    for a, b in zip(moved(16, torch.float32), moved(10**6, torch.float32)): assert torch.equal(a, b)
    for a, b, c in zip(moved(16, torch.bfloat16), moved(16, torch.bfloat16), moved(10**6, torch.float32)):
        assert torch.equal(a, b) and (a.float() - c).abs().max() < .05 # chance is the same again, and moves nothing far

def test_bf16_trains_in_12_bytes(task):
    model, tok = tiny_model('llama', dtype=torch.bfloat16)
    t = Full().attach(model)
    kept = []
    make = t.optimizer
    t.optimizer = lambda params, lr: kept.append(make(params, lr)) or kept[0]
    hist = fit(t, tok, task, steps=30, lr=1e-3, batch_size=8)
    n = sum(p.numel() for p in t.params.values())
    assert sum(training_bytes(t.params.values()).values()) == 12*n
    assert sum(s.numel()*s.element_size() for o in kept[0].state.values() for k, s in o.items() if k != 'step') == 8*n
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and hist.rows[-1]['loss'] < .6*hist.rows[0]['loss']

def test_fp16_raises(task):
    model, tok = tiny_model('llama', dtype=torch.float16)
    with pytest.raises(ValueError, match='cannot train float16 weights: load the model with dtype'): fit(Full().attach(model), tok, task, steps=1)

# --- runs

SCRIPT = '''
import sys, torch
from peftbook.data import Task
from peftbook.full import Full
from peftbook.models import tiny_model
from peftbook.training import fit
torch.set_num_threads(1)
model, tok = tiny_model('llama', dtype=getattr(torch, sys.argv[2]))
task = Task('count', [dict(prompt=f'{a} plus {a % 7}', completion=str(a + a % 7)) for a in range(40)], [], [])
fit(Full(**eval(sys.argv[3])).attach(model), tok, task, out=sys.argv[1], lr=1e-3, **eval(sys.argv[4]))
'''

def command(out, dtype='float32', make={}, **options): return ['-c', SCRIPT, str(out), dtype, repr(make), repr(options)]
def adapter(out): return (Path(out)/'adapter_model.safetensors').read_bytes()

@pytest.mark.parametrize('dtype,make', [('float32', dict(delta=True)), ('bfloat16', {})])
def test_killed_and_resumed_ends_bit_for_bit(tmp_path, dtype, make):
    "SIGKILL after a checkpoint; the rounding's chance belongs to the step, so the resumed run ends on the same bytes."
    def start(out): return subprocess.Popen([sys.executable, *command(out, dtype, make, steps=40, resume=True)], env=env, stderr=subprocess.DEVNULL)
    out = tmp_path/'killed'
    calm, p = start(tmp_path/'calm'), start(out)
    while p.poll() is None and not (out/'checkpoint.safetensors').exists(): time.sleep(.001)
    time.sleep(random.uniform(0, .1))
    p.kill()
    assert p.wait() == -signal.SIGKILL
    assert start(out).wait(120) == 0
    if make: assert start(out).wait(120) == 0                     # finished long ago: read back from the file of the change
    assert calm.wait(120) == 0
    assert adapter(out) == adapter(tmp_path/'calm')
    assert sorted(os.listdir(out)) == ['adapter_model.safetensors', 'history.json', 'tuner.json']

def test_two_processes_equal_one(tmp_path):
    "Two gloo processes of 4 rows against one of 8. Tolerance 1e-4."
    subprocess.run([sys.executable, *command(tmp_path/'one', steps=4, batch_size=8)], env=env, check=True, capture_output=True)
    script = tmp_path/'train.py'
    script.write_text(SCRIPT)
    words = command(tmp_path/'two', steps=4, batch_size=4)[2:]
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script), *words], env=env, check=True, capture_output=True, timeout=300)
    one, two = (load_file(tmp_path/o/'adapter_model.safetensors') for o in ('one', 'two'))
    assert one.keys() == two.keys() and all((one[n] - two[n]).abs().max() < 1e-4 for n in one)

def test_no_room_for_checkpoints_raises_before_training(model, task, tmp_path, monkeypatch):
    t, before = Full().attach(model), bits(model)
    monkeypatch.setattr(shutil, 'disk_usage', lambda d: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(OSError, match='two checkpoints take .* GB, there are 0.00 GB; nothing was trained') as e: fit(t, tiny_model('llama')[1], task, steps=2, out=tmp_path)
    assert e.value.errno == errno.ENOSPC and same(bits(model), before) and '\n' not in str(e.value)

def test_generates_with_the_trained_weights(task):
    model, tok = tiny_model('llama')
    start = generate(model, tok, ['1 plus 1'], 6)
    t = Full().attach(model)
    fit(t, tok, task, steps=20, lr=3e-3)
    tuned = generate(model, tok, ['1 plus 1'], 6)
    with t.disabled(): assert generate(model, tok, ['1 plus 1'], 6) == start != tuned

def test_full_disk_while_writing_is_an_oserror(tmp_path):
    "The library's own error says in words what the system said: it becomes an OSError with the path, and nothing is left."
    code = f"""
import resource, torch
from peftbook.core import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: save_tensors({str(tmp_path/'a'/'w.safetensors')!r}, dict(w=torch.zeros(100_000)))
except OSError as e: print(e)
"""
    said = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout
    assert said.startswith('[Errno 27] File too large; nothing was written') and 'w.safetensors' in said and os.listdir(tmp_path/'a') == []

def test_what_a_killed_writer_left_goes(model, task, tmp_path):
    (tmp_path/'.checkpoint.safetensors.x1').mkdir()
    (tmp_path/'.checkpoint.safetensors.x1'/'.tmp').write_bytes(b'half')
    fit(Full().attach(model), tiny_model('llama')[1], task, steps=2, out=tmp_path, resume=True)
    assert sorted(os.listdir(tmp_path)) == ['adapter_model.safetensors', 'history.json', 'tuner.json']
