"Adapter layers against the library `adapters` 1.3 (its numbers are kept), on other decoders, in bf16, and with bad input."
import importlib.util, json
from pathlib import Path
import pytest, torch
from torch.nn.functional import gelu, layer_norm, linear
from peftbook.adapters import Adapters, find_blocks
from peftbook.core import Tuner, check_tuner
from peftbook.models import tiny_archs, tiny_model

spec = importlib.util.spec_from_file_location('make_adapters_reference', Path(__file__).with_name('make_adapters_reference.py'))
ref = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ref)
kept = json.loads(ref.FILE.read_text())
places = 'houlsby', 'pfeiffer', 'parallel'
ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])

def shake(tuner):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.params.values(): p.copy_(.3*torch.randn(p.shape, generator=g))
    return tuner

@pytest.mark.parametrize('arch,where', ref.CASES)
def test_logits_of_the_library(arch, where):
    model = ref.base(arch)
    t = Adapters(ref.BOTTLENECK, where).attach(model)
    swaps = {e.name: e.new.adapter for e in t._edits}
    for i, b in enumerate(find_blocks_of_base(t)):
        for place, name in ('attention', b.attention), ('feed_forward', b.ff_out):
            if name in swaps: swaps[name].load_state_dict(ref.adapter_values(i, place, {n: p.shape for n, p in swaps[name].named_parameters()}))
    with torch.no_grad(): ours = model(torch.tensor(ref.IDS)).logits.flatten()
    theirs = torch.tensor(kept[f'{arch} {where}'])
    assert theirs.std() > .3 and (ours - theirs).abs().max() < 5e-5
    with t.disabled(), torch.no_grad(): assert (model(torch.tensor(ref.IDS)).logits.flatten() - theirs).abs().max() > .05

def find_blocks_of_base(tuner):
    with tuner.disabled(): return find_blocks(tuner.model)

@pytest.mark.parametrize('where', places)
@pytest.mark.parametrize('arch', tiny_archs)
def test_every_promise(arch, where):
    for act in ('gelu', 'relu', 'silu'): check_tuner(Adapters(5, where, act), tiny_model(arch)[0])

def test_other_decoders():
    "Blocks are found by what they hold, not by a list of architectures."
    tf = pytest.importorskip('transformers')
    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    grouped = dict(small, num_key_value_heads=2, intermediate_size=48)
    configs = [tf.Gemma2Config(**grouped, head_dim=8), tf.MixtralConfig(**grouped, num_local_experts=2), tf.FalconConfig(**small), tf.StableLmConfig(**grouped),
               tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), tf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
               tf.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4), tf.CohereConfig(**grouped), tf.Olmo2Config(**grouped), tf.GPTBigCodeConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)]
    for cfg in configs:
        cfg.pad_token_id = 0
        for k in vars(cfg): # dropout makes two runs differ
            if k.endswith(('dropout', 'pdrop')) and isinstance(getattr(cfg, k), float): setattr(cfg, k, 0.)
        m = tf.AutoModelForCausalLM.from_config(cfg).eval()
        for where in places: check_tuner(Adapters(4, where), m)
        assert len(find_blocks(m)) == 2, cfg.model_type

def test_models_without_one_list_of_blocks_are_refused():
    tf = pytest.importorskip('transformers')
    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match='one list of blocks.*found none among backbone.layers'): Adapters().attach(mamba)
    t5 = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48))
    with pytest.raises(ValueError, match='found none'): find_blocks(t5)
    both = torch.nn.ModuleDict(dict(a=tiny_model('llama')[0], b=tiny_model('gpt2')[0]))
    with pytest.raises(ValueError, match='found a.model.layers and b.transformer.h'): find_blocks(both)
    with pytest.raises(ValueError, match='no lists of modules'): find_blocks(torch.nn.Linear(2, 2))
    assert not any(p.requires_grad is False for p in mamba.parameters()) and not hasattr(mamba, 'tuner')

def test_neox_parallel_residual():
    "Both sublayers read the block's input: y = x + A(attention(norm1 x)) + B(ff(norm2 x))."
    m = tiny_model('gptneox')[0]
    t = shake(Adapters(3).attach(m))
    b, seen = m.gpt_neox.layers[0], {}
    for n in ('attention', 'mlp'): getattr(b, n).base.register_forward_hook(lambda _, __, o, n=n: seen.__setitem__(n, o[0] if isinstance(o, tuple) else o))
    b.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad(): m(ids)
    want = seen['x']
    for n in ('attention', 'mlp'):
        a, h = getattr(b, n).adapter, seen[n]
        want = want + h + linear(gelu(linear(h, a.down.weight, a.down.bias)), a.up.weight, a.up.bias)
    assert (want - seen['y']).abs().max() < 1e-5

def test_beside_reads_what_the_feed_forward_reads():
    "OPT has no feed-forward module: the input is that of fc1, the output that of fc2, and no tensor is kept in between forwards."
    m = tiny_model('opt')[0]
    t = shake(Adapters(3, 'parallel').attach(m))
    b, seen = m.model.decoder.layers[0], {}
    b.fc1.register_forward_hook(lambda _, args, out: seen.update(x=args[0]))
    b.fc2.register_forward_hook(lambda _, args, out: seen.update(h=args[0], y=out))
    with torch.no_grad(): m(ids)
    a, x = b.fc2.adapter, seen['x']
    want = b.fc2.base(seen['h']) + linear(gelu(linear(x, a.down.weight, a.down.bias)), a.up.weight, a.up.bias)
    assert (want - seen['y']).abs().max() < 1e-5 and b.fc2.x is None
    t.detach()
    assert not b.fc1._forward_pre_hooks

@pytest.mark.parametrize('where', places)
def test_fp32_on_a_bf16_base(where):
    "Adapters train in fp32 whatever the base's precision (peft#1249), and compute in the base's."
    for arch in tiny_archs:
        m = tiny_model(arch, dtype=torch.bfloat16)[0]
        before = m(ids).logits
        t = Adapters(4, where).attach(m)
        assert torch.equal(m(ids).logits, before) and {p.dtype for p in t.params.values()} == {torch.float32}
        shake(t)
        logits = m(ids).logits
        logits.float().sum().backward()
        assert logits.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in t.params.values())

def test_attention_keeps_the_rest_of_its_tuple():
    m = tiny_model('gpt2')[0]
    m.set_attn_implementation('eager')
    want = m(ids, output_attentions=True).attentions
    Adapters(4).attach(m)
    got = m(ids, output_attentions=True).attentions
    assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, want))

def test_file_holds_the_adapters_alone(tmp_path):
    "Names and size of what is saved (peft#2092), and a file that lacks a tensor is refused by name (peft#1932)."
    from safetensors.torch import load_file, save_file
    m = tiny_model('llama')[0]
    t = shake(Adapters(4, 'pfeiffer').attach(m))
    t.save(tmp_path)
    have = load_file(tmp_path/'adapter_model.safetensors')
    assert sorted(have) == [f'model.layers.{i}.mlp.adapter.{n}' for i in (0, 1) for n in ('down.bias', 'down.weight', 'up.bias', 'up.weight')]
    assert sum(v.numel() for v in have.values()) == 2*(2*32*4 + 32 + 4) == t.cost()['trained']
    t.detach()
    other = Adapters(5, 'pfeiffer').attach(m)
    with pytest.raises(ValueError, match='carries adapters already'): Tuner.load(tmp_path, m)
    other.detach()
    back = Tuner.load(tmp_path, m)
    assert (back.bottleneck, back.where, back.act) == (4, 'pfeiffer', 'gelu') and torch.equal(back.tensors[next(iter(have))], have[next(iter(have))])

@pytest.mark.parametrize('kw,says', [(dict(bottleneck=0), 'bottleneck=0'), (dict(bottleneck=2.5), 'bottleneck=2.5'), (dict(bottleneck=True), 'bottleneck=True'),
    (dict(where='after'), "where='after'.*'parallel'"), (dict(act='swish'), "act='swish'.*'silu'")])
def test_bad_options(kw, says):
    with pytest.raises(ValueError, match=says): Adapters(**kw)

def test_merging_says_why():
    t = Adapters(4).attach(tiny_model('llama')[0])
    with pytest.raises(TypeError, match='adapters cannot be merged: .*nonlinear'): t.merge()
