"Prefix tuning: against PEFT with the tensors copied, under padding, caches, packing and checkpointing, and with the MLP that is folded away."
import json, pytest, torch
from torch.nn.functional import cross_entropy

from peftbook.core import Tuner, check_tuner, checkpoint_activations
from peftbook.data import Task, collate, encode_rows, pack
from peftbook.models import generate, render, tiny_archs, tiny_model
from peftbook.prefix_tuning import PrefixTuning
from peftbook.prompt_tuning import PromptTuning
from peftbook.speed import supervised_loss
from peftbook.training import Progress, fit

ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
places = (mask.cumsum(-1) - 1).clamp(min=0)
rows = [dict(prompt=f'say {a}', completion=b) for a, b in zip('abcdefgh', 'hgfedcba')]
task = Task('toy', rows, rows, [])

def attached(arch='llama', shaken=True, dtype=torch.float32, **kw):
    "A tiny model with a prefix whose tensors are off their start."
    torch.manual_seed(0)
    m, tok = tiny_model(arch, dtype=dtype)
    t = PrefixTuning(5, **kw).attach(m)
    if shaken:
        with torch.no_grad():
            for p in t.params.values(): p += .3*torch.randn_like(p)
    return m, tok, t

def logits(m, x=ids, **kw):
    with torch.no_grad(): return m(input_ids=x, **kw).logits.float()

# --- PEFT with the tensors copied

def as_peft(x): return x.permute(3, 0, 1, 2, 4).flatten(1) # place x (layers, keys and values, heads, width)

def pair(arch):
    "The same base twice, with the same prefix in ours and in PEFT's."
    peft = pytest.importorskip('peft')
    m, _, t = attached(arch)
    theirs = peft.get_peft_model(tiny_model(arch)[0], peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=5)).eval()
    w = theirs.prompt_encoder.default.embedding.weight
    with torch.no_grad(): w.copy_(as_peft(t.whole()))
    return m, t, theirs, w

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('padded', [False, True])
def test_parity_with_peft(arch, padded):
    "Logits and gradients. In a padded batch PEFT must be given positions that count the real tokens; ours counts them itself."
    m, t, theirs, w = pair(arch)
    a = m(input_ids=ids, **(dict(attention_mask=mask) if padded else {})).logits
    b = theirs(input_ids=ids, **(dict(attention_mask=mask, position_ids=places) if padded else dict(attention_mask=torch.ones_like(ids)))).logits
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    assert (a - b)[real].abs().max() < 2e-5
    for l in (a, b): cross_entropy(l[real], ids[real]).backward()
    if padded and arch != 'opt': # what the positions are for; OPT takes them from its mask
        counted = logits(theirs, attention_mask=mask)
        assert (a - counted)[0, 2:].abs().max() > 1e-3 and (a - counted)[1].abs().max() < 2e-5
    grad = as_peft(t.params['prefix'].grad)
    assert grad.abs().max() > 0 and (grad - w.grad).abs().max() < 1e-5*max(1, grad.abs().max().item())

@pytest.mark.parametrize('arch', ['llama', 'qwen2', 'gpt2'])
def test_three_steps_end_where_pefts_do(arch):
    m, t, theirs, w = pair(arch)
    for model in (m, theirs):
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.)
        for _ in range(3):
            l = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            cross_entropy(l[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            opt.step(); opt.zero_grad()
    assert (as_peft(t.params['prefix']) - w).abs().max() < 1e-4

@pytest.mark.parametrize('arch', ['llama', 'qwen2', 'gpt2', 'gptneox'])
def test_generation_equals_pefts(arch):
    "peft#2821: the same tokens, with the cache."
    m, t, theirs, w = pair(arch)
    want = ids # word by word: PEFT 0.21.2's own generate loses its prefix under transformers 5.24, which renamed the cache
    with torch.no_grad():
        for _ in range(8): want = torch.cat((want, theirs(input_ids=want, attention_mask=torch.ones_like(want)).logits[:, -1:].argmax(-1)), 1)
    kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(m.generate(input_ids=ids, **kw), want)

# --- padding, caches

@pytest.mark.parametrize('arch', tiny_archs)
def test_padded_row_equals_the_row_alone(arch):
    "peft#1093: on the left and on the right, with positions and without."
    m, _, _ = attached(arch)
    alone = logits(m, ids[:1, 2:])
    for kw in (dict(attention_mask=mask), dict(attention_mask=mask, position_ids=places)):
        assert (logits(m, **kw)[:1, 2:] - alone).abs().max() < 1e-5
    right = torch.cat((ids[:1, 2:], ids[:1, :2]), 1)
    assert (logits(m, right, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))[:, :4] - alone).abs().max() < 1e-5

@pytest.mark.parametrize('arch', tiny_archs)
def test_cached_generation_of_a_padded_batch(arch):
    "peft#1962, #2821: cached or not, padded or alone, once or twice: the same tokens."
    m, _, _ = attached(arch)
    kw = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    cached, again, uncached = (m.generate(ids, attention_mask=mask, use_cache=c, **kw) for c in (True, True, False))
    assert torch.equal(cached, uncached) and torch.equal(cached, again)
    alone = m.generate(ids[:1, 2:], attention_mask=mask[:1, 2:], **kw)
    assert torch.equal(alone[0, 4:], cached[0, 6:])

def test_one_forward_with_the_cache_at_a_time():
    "Token by token with the model's own cache: the logits of the whole row at once."
    m, _, _ = attached('qwen2')
    whole, cache, steps = logits(m, ids[:1]), None, []
    for i in range(ids.shape[1]):
        with torch.no_grad(): out = m(input_ids=ids[:1, i:i+1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[0, 0])
    assert (torch.stack(steps) - whole[0]).abs().max() < 1e-5 and cache.get_seq_length() == 5 + 6

def test_eager_attention_equals_sdpa():
    m, _, _ = attached('qwen2')
    a = logits(m, attention_mask=mask)
    m.set_attn_implementation('eager')
    assert (logits(m, attention_mask=mask) - a)[mask.bool()].abs().max() < 1e-5

def test_windowed_attention_is_refused():
    "A layer that forgets old places would lose the prefix without a word."
    import transformers as tf
    cfg = tf.MistralConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, sliding_window=4)
    m = tf.MistralForCausalLM(cfg).eval()
    t = PrefixTuning(2, init='random')
    t.start = lambda model: None # it has no tokenizer
    t.attach(m)
    with pytest.raises(ValueError, match='needs a cache that keeps every place'): m(ids)

# --- packing

@pytest.mark.parametrize('arch', tiny_archs)
def test_packed_rows_equal_rows_alone(arch):
    "trl#3067: no row sees another, and all see the prefix: loss and gradients."
    m, tok, t = attached(arch)
    enc, _ = encode_rows(tok, rows[:4])
    def run(batches):
        m.zero_grad()
        loss = sum(supervised_loss(m, b)[0] for b in batches)
        loss.backward()
        return loss.item(), t.params['prefix'].grad.clone()
    packed = pack(enc, 2*max(len(e['input_ids']) for e in enc))
    assert len(packed) == 2
    (a, da), (b, db) = run([collate([e], 0) for e in enc]), run([collate(packed, 0)])
    assert abs(a - b) < 1e-3 and (da - db).abs().max() < 1e-4*max(1, da.abs().max().item())

def test_fit_on_packed_rows():
    m, tok, t = attached(shaken=False)
    hist = fit(t, tok, task, steps=12, pack=128, batch_size=2)
    assert hist.rows[-1]['loss'] < hist.rows[0]['loss']

# --- checkpointing

def test_checkpointing_raises_and_says_why():
    "peft#869: in training it raises, before any step; in eval mode and once it is off all is well."
    m, tok, t = attached()
    start, before = logits(m), t.params['prefix'].detach().clone()
    checkpoint_activations(m)
    assert torch.equal(logits(m), start)
    with pytest.raises(ValueError, match=r'does not survive gradient checkpointing.*checkpoint_activations\(model, False\)') as e: fit(t, tok, task, steps=2)
    assert '\n' not in str(e.value) and torch.equal(t.params['prefix'], before) and not m.training
    checkpoint_activations(m, False)
    assert len(fit(t, tok, task, steps=2).rows) == 2

# --- the start

@pytest.mark.parametrize('arch', tiny_archs)
def test_prefix_from_words_is_the_words(arch):
    "peft#2816: the default start lies where words do: it is what words leave, in every layer."
    text = 'be kind'
    m, tok = tiny_model(arch)
    words = torch.tensor(tok(text, add_special_tokens=False).input_ids).expand(2, -1)
    n = words.shape[1]
    plain = logits(m, torch.cat((words, ids), 1))[:, n:]
    for t in (PrefixTuning(n, text=text), PromptTuning(n, 'text', text)):
        t.attach(m)
        assert (logits(m) - plain).abs().max() < 1e-5, t.name
        t.detach()
    assert PrefixTuning().init == 'text'

def test_start_is_the_same_in_training_mode():
    "Dropout must not enter the start, nor a checkpointing base lose it."
    import transformers as tf
    def start(train):
        m, _ = tiny_model('gpt2')
        m.config.attn_pdrop = m.config.resid_pdrop = .5
        for x in m.modules():
            if isinstance(x, torch.nn.Dropout): x.p = .5
        if train: m.train(); checkpoint_activations(m)
        return PrefixTuning(4).attach(m).params['prefix'], m.training
    (a, _), (b, still) = start(False), start(True)
    assert torch.equal(a, b) and still

def test_seeds():
    "The same seed gives the same random start, another one another; no start touches the base."
    def start(seed, init):
        torch.manual_seed(seed)
        return PrefixTuning(4, init).attach(tiny_model('qwen2')[0]).params['prefix'].detach()
    for init in ('random', 'vocab'):
        assert torch.equal(start(0, init), start(0, init)) and not torch.equal(start(0, init), start(1, init))
    assert torch.equal(start(0, 'text'), start(1, 'text'))

# --- files

def test_file_holds_its_own_numbers_alone(tmp_path):
    "peft#2092: layers x 2 x heads x places x width numbers of 4 bytes, with the MLP or without."
    for kw in ({}, dict(reparam=16)):
        m, _, t = attached('qwen2', **kw)
        size = (t.save(tmp_path/str(len(kw)))/'adapter_model.safetensors').stat().st_size
        assert 0 < size - 4*2*2*2*5*8 < 200 and t.cost()['bytes'] == 4*2*2*2*5*8

@pytest.mark.parametrize('arch', tiny_archs)
def test_mlp_is_folded_away_with_the_same_logits(arch, tmp_path):
    m, _, t = attached(arch, reparam=16)
    tuned = logits(m)
    t.save(tmp_path)
    assert torch.equal(logits(m), tuned) and 'prefix_in' in t.params # saving leaves the run as it was
    assert json.loads((tmp_path/'tuner.json').read_text())['config']['reparam'] is None
    t.detach()
    back = Tuner.load(tmp_path, m)
    assert torch.equal(logits(m), tuned) and list(back.params) == ['prefix']
    assert not [n for n, _ in m.named_parameters() if n.startswith('prefix_')]

def test_loaded_prefix_trains_on(tmp_path):
    "peft#282: a loaded adapter is not frozen."
    m, tok, t = attached(reparam=8)
    t.save(tmp_path); t.detach()
    back = Tuner.load(tmp_path, m)
    before = back.params['prefix'].detach().clone()
    fit(back, tok, task, steps=2)
    assert not torch.equal(back.params['prefix'], before)

@pytest.mark.parametrize('have', [{}, dict(prefix=torch.zeros(1)), dict(prefix=torch.zeros(2, 2, 2, 5, 8), more=torch.zeros(1))])
def test_wrong_tensors_raise_and_change_nothing(have):
    "peft#1932, #2566, #2699; and the MLP is still there."
    m, _, t = attached(reparam=8)
    old = {n: p.detach().clone() for n, p in t.params.items()}
    with pytest.raises(ValueError, match='nothing was loaded'): t.take(have, 'there')
    assert t.params.keys() == old.keys() and all(torch.equal(p, old[n]) for n, p in t.params.items())

def test_bf16_base_trains_in_fp32():
    "peft#1249: steps of a small rate would be lost in bf16."
    m, tok, t = attached(dtype=torch.bfloat16, shaken=False)
    fit(t, tok, task, steps=2)
    assert t.params['prefix'].dtype == torch.float32 and m(ids).logits.dtype == torch.bfloat16

# --- the MLP and runs that stop

def interrupt_at(monkeypatch, step):
    "Ctrl-C at that step."
    import os, signal
    update = Progress.update
    def f(self, s, loss, tokens):
        if s == step: os.kill(os.getpid(), signal.SIGINT)
        return update(self, s, loss, tokens)
    monkeypatch.setattr(Progress, 'update', f)

def test_stopped_run_with_the_mlp_ends_bit_for_bit(tmp_path, monkeypatch):
    "Taken up again from other tensors, it ends on the same file as the run that nobody disturbed."
    def go(out, seed):
        torch.manual_seed(seed)
        m, tok = tiny_model('llama')
        t = PrefixTuning(4, reparam=8).attach(m)
        return fit(t, tok, task, steps=20, out=tmp_path/out, resume=True)
    calm = go('calm', 0)
    with monkeypatch.context() as mp:
        interrupt_at(mp, 7)
        with pytest.raises(KeyboardInterrupt): go('stopped', 0)
    again = go('stopped', 1)
    assert [o['loss'] for o in again.rows] == [o['loss'] for o in calm.rows]
    files = [(tmp_path/o/'adapter_model.safetensors').read_bytes() for o in ('calm', 'stopped')]
    assert files[0] == files[1]

def test_finished_run_with_the_mlp_is_resumed(tmp_path):
    "By a fresh tuner, by the one that made it, and by either once more."
    m, tok, t = attached(reparam=8, shaken=False)
    hist = fit(t, tok, task, steps=3, out=tmp_path)
    end = logits(m)
    other, _, fresh = attached(reparam=8)
    for model, tuner in ((other, fresh), (other, fresh), (m, t), (m, t)):
        assert vars(fit(tuner, tok, task, steps=3, out=tmp_path, resume=True)) == vars(hist)
        assert torch.equal(logits(model), end) and list(tuner.params) == ['prefix']
    t.detach()
    assert not [n for n, _ in m.named_parameters() if 'prefix' in n]

def test_gradient_reaches_every_tensor_of_the_mlp_after_a_step():
    "At the first step only its last layer moves, for it begins at zero; from the second on all do."
    m, tok, t = attached(reparam=8, shaken=False)
    start = {n: p.detach().clone() for n, p in t.params.items()}
    fit(t, tok, task, steps=1)
    assert {n for n, p in t.params.items() if not torch.equal(p, start[n])} == {'prefix', 'prefix_w2', 'prefix_b2'}
    fit(t, tok, task, steps=2)
    assert not [n for n, p in t.params.items() if torch.equal(p, start[n])]

# --- the battery and the errors

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('kw', [dict(), dict(reparam=16), dict(init='random'), dict(init='vocab')])
def test_battery(arch, kw): check_tuner(PrefixTuning(7, **kw), tiny_model(arch)[0])

def test_generate_and_render_take_it():
    m, tok, t = attached()
    tuned = generate(m, tok, ['hello', 'a longer request'], max_new_tokens=6)
    assert tuned == [generate(m, tok, [p], max_new_tokens=6)[0] for p in ('hello', 'a longer request')]
    assert render(tok, 'hello', t) == render(tok, 'hello')

def test_the_prefix_takes_its_share_of_the_context():
    m, tok, t = attached()
    with pytest.raises(ValueError, match='exceed the 1019 positions'): generate(m, tok, ['x'*1015], max_new_tokens=4)

@pytest.mark.parametrize('make,words', [
    (lambda: PrefixTuning(0), 'n_tokens=0'), (lambda: PrefixTuning(2.5), 'n_tokens=2.5'), (lambda: PrefixTuning(1024), 'the model has 1024 positions'),
    (lambda: PrefixTuning(2, text='be kind to all'), 'more than n_tokens=2'), (lambda: PrefixTuning(init='words'), "init='words'"),
    (lambda: PrefixTuning(text='  '), 'text is empty'), (lambda: PrefixTuning(reparam=0), 'reparam=0'), (lambda: PrefixTuning(reparam='wide'), "reparam='wide'")])
def test_bad_options_raise_one_line_and_leave_the_model(make, words):
    m = tiny_model('llama')[0]
    with pytest.raises(ValueError) as e: make().attach(m)
    assert words in str(e.value) and '\n' not in str(e.value)
    assert not hasattr(m, 'tuner') and not hasattr(m, 'prefix') and all(p.requires_grad for p in m.parameters())

def test_merging_says_why_not():
    m, _, t = attached()
    with pytest.raises(TypeError, match='prefix_tuning cannot be merged: its keys and values stand in front'): t.merge()
