"Training where the chapter's cells don't reach: several processes, real kills, full disks, other precisions; each of the field's pains by name."
import errno, json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

import peftbook.training as training
from peftbook.core import *
from peftbook.data import Task, collate, encode
from peftbook.lora import LoRA
from peftbook.models import tiny_archs, tiny_model
from peftbook.speed import supervised_loss
from peftbook.training import History, Progress, evaluate, fit, lr_schedule, schedules

SCRIPT = '''
import os, sys, torch
from peftbook.data import Task
from peftbook.lora import LoRA
from peftbook.models import tiny_model
from peftbook.training import fit
out, seed, options = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
torch.manual_seed(seed + int(os.environ.get('RANK', 0)))
torch.set_num_threads(1)
model, tok = tiny_model('llama')
task = Task('count', [dict(prompt=f'{a} plus {a % 7}', completion=str(a + a % 7)) for a in range(40)], [], [])
fit(LoRA(dropout=options.pop('dropout', 0.)).attach(model), tok, task, out=out, **options)
'''
env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

@pytest.fixture(scope='module')
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp('script')/'train.py'
    path.write_text(SCRIPT)
    return str(path)

def command(script, out, seed, options): return [script, str(out), str(seed), repr(options)]
def run(cmd): subprocess.run(cmd, env=env, check=True, capture_output=True, timeout=300)
def adapter(out): return (Path(out)/'adapter_model.safetensors').read_bytes()

@pytest.fixture
def task():
    rows = [dict(prompt=f'{a} plus {a % 7}', completion=str(a + a % 7)) for a in range(40)]
    return Task('count', rows, rows[:6], rows[:6], score=lambda row, reply: float(reply == row['completion']))

@pytest.fixture
def llama():
    torch.manual_seed(0)
    model, tok = tiny_model('llama')
    return LoRA().attach(model), tok

def flat(tuner): return torch.cat([p.detach().flatten() for p in tuner.params.values()])

# --- what is trained

@pytest.mark.parametrize('arch', tiny_archs)
def test_loss_falls(arch, task):
    model, tok = tiny_model(arch)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    hist = fit(LoRA(targets='all-linear').attach(model), tok, task, steps=30, lr=.02)
    assert hist.rows[-1]['loss'] < .8*hist.rows[0]['loss']
    model.tuner.detach()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())

def test_bf16_base_trains_in_fp32(task):
    "peft#1249: adapters in half precision diverge."
    model, tok = tiny_model('llama', dtype=torch.bfloat16)
    tuner = LoRA().attach(model)
    for p in tuner.params.values(): p.data = p.data.bfloat16()
    fit(tuner, tok, task, steps=2)
    assert {p.dtype for p in tuner.params.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}

def test_accumulation_divides_by_tokens(llama, task):
    "transformers PR 35438: batches of unlike length, and still the gradient of one big batch. Tolerance 1e-6."
    from accelerate import Accelerator
    tuner, tok = llama
    for p in tuner.params.values(): torch.nn.init.normal_(p, std=.1)
    enc = [encode(tok, dict(prompt='p', completion='long '*n)) for n in (1, 9, 2, 7)]
    n = sum(l != -100 for e in enc for l in e['labels'])
    def grad(size):
        micro = [collate(enc[i:i+size], 0) for i in range(0, 4, size)]
        loss, _ = training.gradient_step(Accelerator(), tuner.model, list(tuner.params.values()), micro, n)
        return loss, torch.cat([p.grad.flatten() for p in tuner.params.values()])
    (l1, g1), (l4, g4), (l2, g2) = grad(4), grad(1), grad(3)
    torch.testing.assert_close(torch.stack([l4, l2]), torch.stack([l1, l1]))
    torch.testing.assert_close(g4, g1, rtol=0, atol=1e-6)
    torch.testing.assert_close(g2, g1, rtol=0, atol=1e-6)
    direct = torch.autograd.grad(supervised_loss(tuner.model, collate(enc, 0))[0]/n, list(tuner.params.values()))
    torch.testing.assert_close(g1, torch.cat([g.flatten() for g in direct]), rtol=0, atol=1e-6)

def test_accumulated_run_equals_one_batch(task):
    "Ten steps of Adam, at 8 rows or 4 times 2. Tolerance 1e-4 on numbers that move by 0.05."
    ends = []
    for kw in (dict(batch_size=8), dict(batch_size=2, accumulate=4)):
        torch.manual_seed(0)
        model, tok = tiny_model('llama')
        tuner = LoRA().attach(model)
        fit(tuner, tok, task, steps=10, **kw)
        ends.append(flat(tuner))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)

def test_two_processes_equal_one(script, tmp_path):
    "Two gloo processes of 4 rows give the adapter of one with 8, though each starts from its own tensors (the first one's count). Tolerance 1e-4."
    run([sys.executable, *command(script, tmp_path/'one', 0, dict(steps=8, batch_size=8))])
    run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *command(script, tmp_path/'two', 0, dict(steps=8, batch_size=2, accumulate=2))])
    one, two = (load_file(tmp_path/o/'adapter_model.safetensors') for o in ('one', 'two'))
    assert one.keys() == two.keys()
    for n in one: torch.testing.assert_close(two[n], one[n], rtol=0, atol=1e-4)
    h1, h2 = (History.load(tmp_path/o/'history.json') for o in ('one', 'two'))
    assert [o['loss'] for o in h2.rows] == pytest.approx([o['loss'] for o in h1.rows], abs=1e-4)
    assert [o['tokens'] for o in h2.rows] == [o['tokens'] for o in h1.rows]
    assert h2.settings['processes'] == 2

@pytest.mark.parametrize('reentrant', [True, False])
def test_gradient_checkpointing_trains(llama, task, reentrant):
    "peft#137, transformers#42489: checkpointing above frozen embeddings must not cut off the gradients."
    tuner, tok = llama
    start = flat(tuner)
    plain = fit(tuner, tok, task, steps=3)
    end = flat(tuner)
    torch.manual_seed(0)
    model, tok = tiny_model('llama')
    again = LoRA().attach(model)
    assert torch.equal(flat(again), start)
    model._set_gradient_checkpointing(True, __import__('functools').partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant))
    fit(again, tok, task, steps=3)
    torch.testing.assert_close(flat(again), end, rtol=0, atol=1e-6)
    assert model.model._gradient_checkpointing_func.keywords == dict(use_reentrant=reentrant)     # as the user left it

def test_packing_trains_on_the_same_tokens(llama, task):
    tuner, tok = llama
    hist = fit(tuner, tok, task, steps=2, batch_size=100, pack=128)
    assert hist.rows[0]['tokens'] == sum(len(encode(tok, r)['input_ids']) for r in task.train)
    want = evaluate_loss_of_fresh(task)
    assert hist.rows[0]['loss'] == pytest.approx(want, abs=1e-4)      # no row sees another (trl#3067)

def test_packing_refuses_eager_attention(llama, task):
    tuner, tok = llama
    tuner.model.set_attn_implementation('eager')
    with pytest.raises(ValueError, match="pack needs attn_implementation='sdpa'"): fit(tuner, tok, task, steps=1, pack=128)

def evaluate_loss_of_fresh(task):
    model, tok = tiny_model('llama')
    return evaluate(model, tok, Task('t', task.train, [], []), split='train')['loss']

# --- what must not train in silence

def test_frozen_adapter_raises(llama, task):
    "peft#282, trl#6700: no trainable tensor, and an optimizer that does nothing."
    tuner, tok = llama
    for p in tuner.params.values(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='lora trains nothing: none of its 8 tensors'): fit(tuner, tok, task)

def test_reloaded_adapter_trains(llama, task, tmp_path):
    "peft#282: an adapter that was saved and loaded goes on learning."
    tuner, tok = llama
    tuner.save(tmp_path)
    model = tuner.detach()._home
    again = Tuner.load(tmp_path, model)
    before = flat(again)
    fit(again, tok, task, steps=1)
    assert not torch.equal(flat(again), before)

def test_some_frozen_stay(llama, task):
    tuner, tok = llama
    for n, p in tuner.params.items(): p.requires_grad_(n.endswith('B'))
    old = {n: p.detach().clone() for n, p in tuner.params.items()}
    fit(tuner, tok, task, steps=2)
    assert all(torch.equal(p, old[n]) != n.endswith('B') for n, p in tuner.params.items())

def test_tensor_without_gradient_raises(llama, task):
    "peft#137: a tensor that no gradient reaches is named, before any tensor moves."
    class Idle(Tuner):
        def edits(self, model):
            p, q = torch.nn.Parameter(torch.zeros(32)), torch.nn.Parameter(torch.zeros(2))
            return [Hook('model.norm', lambda m, a, out: out + p, params=dict(used=p, idle=q))]
    try:
        tuner, tok = llama
        model = tuner.detach()._home
        idle = Idle().attach(model)
        with pytest.raises(ValueError, match='no gradient reaches 1 of the 2 tensors of idle: model.norm.idle'): fit(idle, tok, task)
        assert not idle.params['model.norm.used'].any() and not model.training
    finally: methods.pop('idle')

def test_not_attached_raises(llama, task):
    with pytest.raises(ValueError, match='not attached'): fit(LoRA(), llama[1], task)

def test_nan_stops(llama, task, tmp_path, monkeypatch):
    "The step, the last good checkpoint and the way out are in the message; the tensors stay as they were."
    tuner, tok = llama
    real, calls = training.supervised_loss, []
    def bad(model, batch):
        calls.append(1)
        loss, n = real(model, batch)
        return (loss*float('nan'), n) if len(calls) == 8 else (loss, n)
    monkeypatch.setattr(training, 'supervised_loss', bad)
    with pytest.raises(FloatingPointError) as e: fit(tuner, tok, task, steps=30, out=tmp_path/'o')
    assert str(e.value).startswith('step 8: the loss is nan') and f"{tmp_path/'o'/'checkpoint.safetensors'} of step 6" in str(e.value) and 'lower rate' in str(e.value)
    assert flat(tuner).isfinite().all() and '\n' not in str(e.value)

# --- killed, interrupted, resumed

LONG = dict(steps=60, accumulate=2, batch_size=4, dropout=.1, resume=True)

def test_killed_and_resumed_ends_bit_for_bit(script, tmp_path):
    "SIGKILL at a random moment after a checkpoint, twice; started again, from other tensors, it ends on the same bytes."
    run([sys.executable, *command(script, tmp_path/'calm', 0, LONG)])
    out, last, kills = tmp_path/'killed', b'', 0
    for seed in (0, 1):
        p = subprocess.Popen([sys.executable, *command(script, out, seed, LONG)], env=env, stderr=subprocess.DEVNULL)
        ckpt = out/'checkpoint.safetensors'
        while p.poll() is None and not (ckpt.exists() and ckpt.read_bytes() != last): time.sleep(.001)
        time.sleep(random.uniform(0, .15))
        p.kill(); kills += p.wait() == -signal.SIGKILL
        last = ckpt.read_bytes() if ckpt.exists() else b''
    run([sys.executable, *command(script, out, 2, LONG)])
    assert kills and adapter(out) == adapter(tmp_path/'calm')
    assert sorted(os.listdir(out)) == ['adapter_model.safetensors', 'history.json', 'tuner.json']

def interrupt_at(monkeypatch, step):
    update = Progress.update
    def f(self, s, loss, tokens):
        if s == step: signal.raise_signal(signal.SIGINT)
        return update(self, s, loss, tokens)
    monkeypatch.setattr(Progress, 'update', f)

def test_ctrl_c_saves_and_resumes(task, tmp_path, monkeypatch):
    "The step that was interrupted ends whole; the run that goes on from it ends where the undisturbed one does."
    def go(out, seed):
        torch.manual_seed(seed)
        model, tok = tiny_model('llama')
        return fit(LoRA(dropout=.1).attach(model), tok, task, steps=20, eval_every=2, out=tmp_path/out, resume=True)
    calm = go('calm', 0)
    with monkeypatch.context() as m:
        interrupt_at(m, 7)
        with pytest.raises(KeyboardInterrupt) as e: go('stopped', 0)
    assert str(e.value) == f"stopped after step 8 of 20: run the same call with resume=True to go on from {tmp_path/'stopped'}"
    assert os.listdir(tmp_path/'stopped') == ['checkpoint.safetensors']
    again = go('stopped', 1)
    assert again.evals == calm.evals and [o['loss'] for o in again.rows] == [o['loss'] for o in calm.rows]
    assert adapter(tmp_path/'stopped') == adapter(tmp_path/'calm')

def test_ctrl_c_without_out(llama, task, monkeypatch):
    (tuner, tok), was = llama, signal.getsignal(signal.SIGINT) # a shell's background jobs have none
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt, match='stopped after step 4 of 20: the tuner keeps'): fit(tuner, tok, task, steps=20)
    assert signal.getsignal(signal.SIGINT) is was and not tuner.model.training

def test_resume_of_a_finished_run(llama, task, tmp_path):
    tuner, tok = llama
    hist = fit(tuner, tok, task, steps=3, out=tmp_path)
    end = flat(tuner)
    for p in tuner.params.values(): p.data.zero_()
    again = fit(tuner, tok, task, steps=3, out=tmp_path, resume=True)
    assert vars(again) == vars(hist) and torch.equal(flat(tuner), end)

def test_resume_with_nothing_starts_afresh(llama, task, tmp_path):
    tuner, tok = llama
    (tmp_path/'new').mkdir()
    (tmp_path/'new'/'.checkpoint.safetensors.x1').write_bytes(b'half')        # killed while it wrote its first checkpoint
    assert len(fit(tuner, tok, task, steps=2, out=tmp_path/'new', resume=True, max_length=None).rows) == 2
    assert sorted(os.listdir(tmp_path/'new')) == ['adapter_model.safetensors', 'history.json', 'tuner.json']

@pytest.mark.parametrize('change,words', [(dict(lr=.5), 'lr=0.01, not 0.5'), (dict(steps=4), 'steps=3, not 4'), (dict(seed=1), 'seed=0, not 1'),
                                          (dict(schedule='linear'), "schedule='cosine', not 'linear'")])
def test_other_settings_raise(llama, task, tmp_path, change, words):
    tuner, tok = llama
    fit(tuner, tok, task, steps=3, out=tmp_path)
    with pytest.raises(ValueError, match=f'was made with {words}'): fit(tuner, tok, task, **(dict(steps=3, out=tmp_path, resume=True) | change))

def test_other_data_or_method_raises(llama, task, tmp_path):
    tuner, tok = llama
    fit(tuner, tok, task, steps=3, out=tmp_path)
    with pytest.raises(ValueError, match='was made with data='): fit(tuner, tok, Task('count', task.train[1:], [], []), steps=3, out=tmp_path, resume=True)
    model = tuner.detach()._home
    with pytest.raises(ValueError, match='was made with config='): fit(LoRA(r=2).attach(model), tok, task, steps=3, out=tmp_path, resume=True)

def test_folder_with_another_run_raises_before_training(llama, task, tmp_path, monkeypatch):
    tuner, tok = llama
    fit(tuner, tok, task, steps=1, out=tmp_path)
    files = {f: f.read_bytes() for f in tmp_path.iterdir()}
    monkeypatch.setattr(training, 'gradient_step', lambda *a: pytest.fail('it trained'))
    with pytest.raises(FileExistsError, match='holds another run'): fit(tuner, tok, task, steps=1, out=tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == files

def test_damaged_checkpoint_raises(llama, task, tmp_path):
    tuner, tok = llama
    (tmp_path/'checkpoint.safetensors').write_bytes(b'\x10\0\0\0\0\0\0\0{"a"')
    with pytest.raises(ValueError, match='is no checkpoint of a run'): fit(tuner, tok, task, out=tmp_path, resume=True)

def test_full_disk_names_the_path(llama, task, tmp_path, monkeypatch):
    tuner, tok = llama
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device.*checkpoint.safetensors') as e: fit(tuner, tok, task, steps=20, out=tmp_path)
    assert e.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []

def test_unwritable_folder_raises_before_training(llama, task, tmp_path, monkeypatch):
    (tmp_path/'f').write_text('')
    monkeypatch.setattr(training, 'gradient_step', lambda *a: pytest.fail('it trained'))
    with pytest.raises(OSError, match='nothing was trained.*f/sub'): fit(*llama, task, out=tmp_path/'f'/'sub')

# --- settings, chance, and what is left behind

@pytest.mark.parametrize('bad,words', [(dict(steps=0), 'steps=0'), (dict(steps=1.5), 'steps=1.5'), (dict(lr='high'), "lr='high'"), (dict(batch_size=0), 'batch_size=0'), (dict(accumulate=-1), 'accumulate=-1'),
    (dict(lr=0), 'lr=0'), (dict(lr=float('nan')), 'lr=nan'), (dict(clip=0), 'clip=0'), (dict(schedule='cosin'), 'there are cosine, linear, constant'),
    (dict(warmup=5), 'warmup=5'), (dict(eval_every=0), 'eval_every=0'), (dict(max_length=0), 'max_length=0'), (dict(resume=True), 'needs out=')])
def test_bad_settings_raise_one_line(llama, task, bad, words):
    with pytest.raises(ValueError) as e: fit(*llama, task, **bad)
    assert words in str(e.value) and '\n' not in str(e.value)

def test_empty_splits_raise(llama, task):
    tuner, tok = llama
    with pytest.raises(ValueError): fit(tuner, tok, Task('none', [], [], []))
    with pytest.raises(ValueError, match='count.valid has no rows'): fit(tuner, tok, Task('count', task.train, [], []), eval_every=1)
    with pytest.raises(ValueError, match='unknown split'): evaluate(tuner.model, tok, task, split='dev')

def test_dropout_is_seeded_by_step(task):
    ends = []
    for draw in (0, 5):
        torch.manual_seed(0)
        model, tok = tiny_model('llama')
        tuner = LoRA(dropout=.3).attach(model)
        torch.manual_seed(draw)                    # whatever the user's generator stands at
        state = torch.get_rng_state()
        fit(tuner, tok, task, steps=4)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(flat(tuner))
    assert torch.equal(*ends)

@pytest.mark.parametrize('name', schedules)
@pytest.mark.parametrize('steps,warmup', [(1, .1), (2, 0), (7, .5), (100, .1)])
def test_no_step_is_wasted(name, steps, warmup):
    f = lr_schedule(name, steps, warmup)
    assert len(f) == steps and all(0 < o <= 1 for o in f) and (f[0] == 1 or round(warmup*steps) > 0)

def test_evaluate_restores_and_counts_tokens(llama, task):
    tuner, tok = llama
    model = tuner.model
    model.train(); model.lm_head.eval()
    a, b = (evaluate(model, tok, task, batch_size=n, max_new_tokens=2) for n in (1, 6))
    assert a['loss'] == pytest.approx(b['loss'], abs=1e-5) and a['score'] == b['score'] == 0
    assert model.training and not model.lm_head.training

def test_score_is_of_the_reply(llama, task, monkeypatch):
    tuner, tok = llama
    seen = []
    def oracle(model, tok, prompts, max_new_tokens, batch_size):
        seen.extend(prompts)
        return [r['completion'] if i < 3 else 'no' for i, r in enumerate(task.test)]
    monkeypatch.setattr(training, 'generate', oracle)
    assert evaluate(tuner.model, tok, task)['score'] == .5
    assert seen[0] == [dict(role='user', content=task.test[0]['prompt'])]

def test_log_is_ten_lines(llama, task, capfd):
    fit(*llama, task, steps=50)
    err = [l for l in capfd.readouterr().err.splitlines() if l.startswith('step ')]
    assert len(err) == 10 and err[-1].startswith('step 50/50') and err[-1].endswith('in all') and err[0].endswith('left')

def test_terminal_line_is_rewritten(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    bar = Progress(3)
    for i in range(3): bar.update(i+1, 1., 10); time.sleep(.11)
    err = capsys.readouterr().err
    assert err.count('\r') == 3 and err.count('\n') == 1 and err.endswith('\n')

def test_history_draws_itself(llama, task):
    hist = fit(*llama, task, steps=2, eval_every=1)
    assert hist._repr_png_()[:4] == b'\x89PNG' and len(hist.plot().lines) == 2 and 'loss' in repr(hist)
    assert History()._repr_png_() is None and repr(History()) == 'History: no steps'

def test_import_is_light():
    "peftbook.training brings in neither transformers nor accelerate nor matplotlib."
    code = "import sys, peftbook.training; print([m for m in ('transformers', 'accelerate', 'matplotlib', 'safetensors') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env).stdout.strip() == '[]'
