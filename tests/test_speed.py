"The loss on supervised tokens against the plain way: every architecture, either padding, packed rows. Attention by products against SDPA."
import sys
from contextlib import nullcontext

import pytest, torch, torch.nn.functional as F

from peftbook import speed
from peftbook.adapters import Adapters
from peftbook.core import checkpoint_activations
from peftbook.data import Task, collate, encode, pack
from peftbook.full import Full
from peftbook.lora import LoRA
from peftbook.models import tiny_archs, tiny_model
from peftbook.prefix_tuning import PrefixTuning
from peftbook.speed import compiled_layers, fast_attention, fast_layers, supervised_loss
from peftbook.training import fit

rows = [dict(prompt='why', completion='because it is so'), dict(prompt='how much is it, all in all?', completion='two'),
        dict(prompt='hm', completion='yes indeed')]

def plain_loss(model, batch):
    logits = model(**{k: v for k, v in batch.items() if k != 'labels'}, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch['labels'][:, 1:].flatten(), reduction='sum')

def grads(loss, params): return [g for g in torch.autograd.grad(loss, params, allow_unused=True) if g is not None]

@pytest.mark.parametrize('kind', ['right', 'left', 'packed'])
@pytest.mark.parametrize('arch', tiny_archs)
def test_equal_loss_and_gradients(arch, kind):
    "All weights train here, so the head's and the embeddings' gradients are compared too. Tolerance 1e-5 of the largest gradient."
    model, tok = tiny_model(arch)
    enc = [encode(tok, r) for r in rows]
    batch = collate(pack(enc, 200), tok.pad_token_id) if kind == 'packed' else collate(enc, tok.pad_token_id, kind)
    params = list(model.parameters())
    want, (got, n) = plain_loss(model, batch), supervised_loss(model, batch)
    assert n == sum(l != -100 for e in enc for l in e['labels']) and isinstance(n, int)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    a, b = grads(want, params), grads(got, params)
    assert len(a) == len(b) >= 4
    top = max(g.abs().max().item() for g in a)
    assert max((x - y).abs().max().item() for x, y in zip(a, b)) <= 1e-5*top

@pytest.mark.parametrize('arch', tiny_archs)
def test_equal_with_a_tuner(arch):
    model, tok = tiny_model(arch)
    tuner = LoRA().attach(model)
    batch = collate([encode(tok, r) for r in rows], tok.pad_token_id)
    a, b = (grads(l, list(tuner.params.values())) for l in (plain_loss(model, batch), supervised_loss(model, batch)[0]))
    assert len(a) == len(b) == len(tuner.params)
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

def test_scaling_after_the_head_is_kept():
    "Architectures that cap or scale their logits do so after the head; the hook leaves them to it."
    import transformers as tf
    torch.manual_seed(0)
    cfg = tf.Gemma2Config(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=8, final_logit_softcapping=.05, initializer_range=.5)
    model = tf.Gemma2ForCausalLM(cfg).eval()
    ids = torch.randint(5, 99, (2, 9))
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone().index_fill_(1, torch.arange(6), -100))
    loss, n = supervised_loss(model, batch)
    assert n == 6 and loss.item() == pytest.approx(plain_loss(model, batch).item(), rel=1e-6)
    cfg.final_logit_softcapping = None
    assert loss.item() != pytest.approx(supervised_loss(model, batch)[0].item(), rel=1e-4)

def test_bf16_loss_is_fp32():
    model, tok = tiny_model('llama', dtype=torch.bfloat16)
    loss, _ = supervised_loss(model, collate([encode(tok, rows[0])], 0))
    assert loss.dtype == torch.float32

def test_nothing_supervised_raises():
    "trl#588: a batch whose labels are all masked must not train in silence."
    model, tok = tiny_model('llama')
    batch = collate([encode(tok, rows[0])], 0)
    batch['labels'][:, 1:] = -100
    with pytest.raises(ValueError, match='no supervised token'): supervised_loss(model, batch)
    assert not model.get_output_embeddings()._forward_pre_hooks

def test_hook_is_removed_after_an_error():
    model, tok = tiny_model('llama')
    batch = collate([encode(tok, rows[0])], 0)
    batch['input_ids'][0, 0] = 10**6
    with pytest.raises(IndexError): supervised_loss(model, batch)
    assert not model.get_output_embeddings()._forward_pre_hooks

def test_no_head_is_named():
    import transformers as tf
    model = tf.LlamaModel(tf.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match='LlamaModel names no output head'): supervised_loss(model, dict(input_ids=ids, attention_mask=ids, labels=ids))

# --- attention by plain products

def bf16(arch='llama', tuner=None, checkpoint=False):
    model, tok = tiny_model(arch, dtype=torch.bfloat16)
    if tuner is not None: tuner.attach(model)
    checkpoint_activations(model, checkpoint)
    return model.train(), tok

def by_products(monkeypatch):
    "Counts the calls that are computed by products."
    calls, real = [], speed._MatmulAttention.apply
    monkeypatch.setattr(speed._MatmulAttention, 'apply', lambda *a: calls.append(a[0].shape) or real(*a))
    return calls

@pytest.mark.parametrize('kind', ['packed', 'prefix', 'checkpointed'])
def test_attention_by_products_is_as_near_to_fp32_as_sdpa(monkeypatch, kind):
    "Where masks are odd: rows packed into one, a prefix in front, layers computed twice. On average ours may be a fifth further from fp32 than SDPA."
    tuner = PrefixTuning(n_tokens=3, init='vocab') if kind == 'prefix' else LoRA(r=2)
    def gradient(seed, dtype, way):
        torch.manual_seed(seed)
        model, tok = tiny_model('llama', dtype=dtype)
        t = type(tuner)(**tuner.config).attach(model)
        for p in t.params.values(): torch.nn.init.normal_(p, std=.3)
        checkpoint_activations(model, kind == 'checkpointed')
        model.train()
        enc = [encode(tok, r) for r in rows]
        with way(model):
            loss, n = supervised_loss(model, collate(pack(enc, 200) if kind == 'packed' else enc, tok.pad_token_id))
            (loss/n).backward()
        return torch.cat([p.grad.flatten().double() for p in t.params.values()])
    calls, ours, sdpa = by_products(monkeypatch), 0., 0.
    for seed in range(8):
        exact = gradient(seed, torch.float32, nullcontext)
        ours += (gradient(seed, torch.bfloat16, fast_attention) - exact).norm()/exact.norm()
        sdpa += (gradient(seed, torch.bfloat16, nullcontext) - exact).norm()/exact.norm()
    assert len(calls) == 8*(4 if kind == 'checkpointed' else 2) # two layers
    assert ours < 1.2*sdpa

def test_attention_is_picked_by_precision_gradient_and_length(monkeypatch):
    calls, (model, tok) = by_products(monkeypatch), bf16()
    ids = torch.randint(5, 99, (1, 400))
    with fast_attention(model):
        model(ids[:, :20]); assert len(calls) == 2
        model(ids); assert len(calls) == 2                # 400 x 400 scores: left to SDPA
        with torch.no_grad(): model(ids[:, :20])
        assert len(calls) == 2
        model.float()(ids[:, :20]); assert len(calls) == 2

def test_values_may_be_of_another_width_than_keys():
    "As in DeepSeek's latent attention."
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(2, h, 9, w, generator=g, dtype=torch.float64).requires_grad_() for h, w in ((4, 8), (2, 8), (2, 6))]
    ways = [lambda: speed._MatmulAttention.apply(*x, None, .3), lambda: F.scaled_dot_product_attention(*x, scale=.3, is_causal=True, enable_gqa=True)]
    for a, b in zip(*((y := f(), *torch.autograd.grad(y.square().sum(), x)) for f in ways)): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

def test_the_model_has_its_own_attention_back_after_an_error():
    model, _ = bf16()
    with pytest.raises(RuntimeError, match='stop'):
        with fast_attention(model): raise RuntimeError('stop')
    assert model.config._attn_implementation == 'sdpa'
    model.config._attn_implementation = 'eager'
    with fast_attention(model): assert model.config._attn_implementation == 'eager'

def test_fit_trains_with_it(monkeypatch):
    calls, (model, tok) = by_products(monkeypatch), tiny_model('llama', dtype=torch.bfloat16)
    fit(LoRA().attach(model), tok, Task('few', rows, [], []), steps=2)
    assert len(calls) == 4 and model.config._attn_implementation == 'sdpa'

# --- the loss in parts

@pytest.mark.parametrize('dtype,eps', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_loss_in_parts_is_torchs(monkeypatch, dtype, eps):
    "Parts of three rows, the last one shorter; the gradient is rounded to the logits' precision."
    monkeypatch.setattr(speed, '_at_once', 3*50)
    z, y = (torch.randn(10, 50)*5).to(dtype).requires_grad_(), torch.randint(50, (10,))
    ours, theirs = speed._CrossEntropy.apply(z, y), F.cross_entropy(z.float(), y, reduction='sum')
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    a, b = (torch.autograd.grad(l/7, z)[0] for l in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=eps, atol=1e-7)

def test_loss_of_a_sure_and_wrong_model_is_finite():
    z = torch.tensor([[200., 0., -200.]], requires_grad=True)
    loss = speed._CrossEntropy.apply(z, torch.tensor([2]))
    assert loss.item() == 400
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.tensor([[1., 0., -1.]]))

# --- norms and gates in fewer operations

every = dict(lora=lambda: LoRA(targets='all-linear'), adapters=lambda: Adapters(8), full=Full, prefix=lambda: PrefixTuning(3))

@pytest.mark.parametrize('name,checkpointing', [(n, c) for n in every for c in (False, True) if (n, c) != ('prefix', True)]) # a prefix does not survive it
def test_layers_in_fewer_operations_give_the_same_gradients(name, checkpointing):
    model, tok = tiny_model('llama')
    batch = collate([encode(tok, r) for r in rows], tok.pad_token_id)
    tuner = every[name]().attach(model)
    checkpoint_activations(model, checkpointing)
    for p in tuner.params.values(): p.data += .05*torch.randn_like(p)
    a, b = [], []
    for way, out in ((fast_layers, a), (lambda m: nullcontext(), b)):
        with way(model): out += grads(supervised_loss(model, batch)[0], list(tuner.params.values()))
    assert len(a) == len(b) > 0
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5*y.abs().max().item())

def test_layers_are_given_back_after_an_error():
    model, _ = tiny_model('llama')
    with pytest.raises(RuntimeError), fast_layers(model):
        assert sum('forward' in vars(m) for m in model.modules()) == (3 + 7)*len(model.model.layers) + 1 # two norms, a block, seven products; the last norm
        assert sys.modules[type(model).__module__].apply_rotary_pos_emb.func is speed._rotary
        raise RuntimeError('stop')
    assert not any('forward' in vars(m) for m in model.modules())

def test_a_norm_or_block_of_another_kind_is_left_alone():
    "Gemma's norm multiplies by 1 + w, and its gate is a GELU."
    import transformers as tf
    cfg = tf.Gemma2Config(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    model = tf.Gemma2ForCausalLM(cfg)
    with fast_layers(model): assert {type(m).__name__ for m in model.modules() if 'forward' in vars(m)} == {'Linear'} # products alone

def test_without_gradients_layers_are_transformers_own():
    model, tok = tiny_model('llama', dtype=torch.bfloat16)
    ids = torch.randint(5, 99, (2, 9))
    with torch.no_grad():
        want = model(ids).logits
        with fast_layers(model): assert torch.equal(model(ids).logits, want)

@pytest.mark.parametrize('rows', [7, 200, 256, 543, 545, 1000, 1124])
def test_pieces_are_the_product(rows):
    "Whatever the number of rows; in both layouts of the second matrix. The result is a tensor of its own, into which one may write."
    a, W = torch.randn(rows, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    for b in (W.T, W.T.contiguous()):
        y = speed._in_pieces(a, b)
        torch.testing.assert_close(y, a @ b, rtol=.02, atol=.1)
        assert y.shape == (rows, 64) and y.is_contiguous() and not y._is_view()

def test_pieces_are_taken_only_where_they_are_the_same_and_sooner(monkeypatch):
    speed._sooner_in_pieces.cache_clear()
    monkeypatch.setattr(speed, '_in_pieces', lambda a, b: torch.zeros(len(a), b.shape[1], dtype=a.dtype)) # sooner, and wrong
    assert not speed._sooner_in_pieces(1024, 96, 64, True, torch.bfloat16, 2)
    speed._sooner_in_pieces.cache_clear()

def test_a_step_in_pieces_has_the_same_gradients(monkeypatch):
    "With the choice forced, on a model in bf16: loss and gradients are those of whole products within rounding."
    model, tok = tiny_model('llama', dtype=torch.bfloat16)
    batch = collate([encode(tok, r) for r in rows]*40, tok.pad_token_id)
    taken = []
    def product(a, b): taken.append(len(a)); return pieces(a, b)
    pieces = speed._in_pieces
    def one():
        with fast_layers(model): return torch.cat([g.flatten().double() for g in grads(supervised_loss(model, batch)[0], list(model.parameters()))])
    whole = one()
    monkeypatch.setattr(speed, '_product', product)
    assert torch.cosine_similarity(one(), whole, 0) > .9999 and len(taken) == 2*7*len(model.model.layers)

# --- compiled

@pytest.mark.parametrize('make,checkpointing', [(lambda: LoRA(r=2, dropout=.0), False), (lambda: Adapters(bottleneck=4), True)])
def test_compiled_a_run_is_the_same(make, checkpointing):
    "Rows of several lengths: the losses are those of the plain run within rounding, and the model is left as it was."
    model, tok = tiny_model('llama')
    checkpoint_activations(model, checkpointing)
    task, losses = Task('toy', rows*4, [], []), []
    for compile in (False, True):
        torch.manual_seed(0)
        tuner = make().attach(model)
        losses.append([r['loss'] for r in fit(tuner, tok, task, steps=4, batch_size=2, compile=compile).rows])
        tuner.detach()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] != losses[0][0]
    assert not [m for m in model.modules() if 'forward' in vars(m)]

@pytest.mark.parametrize('make', [LoRA, Full])
def test_compiled_in_bf16_products_are_by_halves(make, monkeypatch):
    "With the choice forced: loss and gradients are those of the plain step within rounding, and the layers are torch's own again."
    monkeypatch.setattr(speed, '_pays', lambda rows, b: True)
    model, tok = tiny_model('llama', dtype=torch.bfloat16)
    batch = collate([encode(tok, r) for r in rows]*40, tok.pad_token_id)
    assert batch['input_ids'].numel() > 768
    torch.manual_seed(0)
    tuner = make().attach(model)
    for n, p in tuner.params.items():
        if n.endswith('.B'): p.data.normal_(std=.02)
    def one(way):
        with way(model):
            if way is compiled_layers: assert {type(m).__name__ for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)} == {'_Halved'}
            return torch.cat([g.flatten().double() for g in grads(supervised_loss(model, batch)[0], list(tuner.params.values()))])
    assert torch.cosine_similarity(one(compiled_layers), one(fast_layers), 0) > .999
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    tuner.detach()

def test_compiled_once_for_all_layers_and_lengths():
    "The first block, below which nothing trains, is no other kind; nor is a batch of other rows."
    model, tok = tiny_model('llama')
    tuner = LoRA().attach(model)
    with torch._dynamo.config.patch(error_on_recompile=True), compiled_layers(model):
        for n in (3, 2): supervised_loss(model, collate([encode(tok, r) for r in rows[:n]], tok.pad_token_id))[0].backward()
    assert all(p.grad is not None for p in tuner.params.values())
    tuner.detach()

def test_compiling_is_refused_where_it_cannot_work(tmp_path, monkeypatch):
    "Before anything is written: behind a prefix, on codes of few bits, without blocks, without a compiler."
    from peftbook.quantization import quantize
    model, tok = tiny_model('llama')
    task, out = Task('toy', rows, [], []), tmp_path/'run'
    def refused(tuner, words):
        with pytest.raises(ValueError, match=words) as e: fit(tuner, tok, task, steps=1, out=out, compile=True)
        assert 'leave it out' in str(e.value) and not out.exists()
        tuner.detach()
    refused(PrefixTuning(2).attach(model), 'the prefix of prefix_tuning differs in each layer')
    refused(LoRA().attach(quantize(tiny_model('llama')[0])), 'kernels of their own')
    monkeypatch.setattr('shutil.which', lambda name: None)
    refused(LoRA().attach(model), 'no C.. compiler')
    with pytest.raises(ValueError, match='Linear has no blocks'): speed.blocks_to_compile(torch.nn.Linear(2, 2))

def test_a_norms_gradients_in_bf16_are_off_by_its_rounding_alone():
    "Also the weight's, a sum over a thousand tokens."
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 128, 576, generator=g).bfloat16() for _ in range(2))
    w = (1 + .3*torch.randn(576, generator=g)).bfloat16()
    def grads(f, *args): return torch.autograd.grad(f(*(a := [o.clone().requires_grad_() for o in args])), a, dy.to(args[0].dtype))
    exact = grads(lambda x, w: w*(x*torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)), x.double(), w.double())
    for a, b in zip(grads(lambda x, w: speed._Norm.apply(x, w, 1e-5), x, w), exact): assert (a - b).norm() < 2**-8*b.norm()
