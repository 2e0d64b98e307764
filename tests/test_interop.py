"Files in Hugging Face PEFT's format, both ways against the installed PEFT; cards, the Hub, Trainer, TRL, pipeline, merged folders."
import errno, hashlib, json, os, re, shutil, struct, warnings
from pathlib import Path
from unittest import mock
import pytest, torch
from torch.nn.functional import cross_entropy

import peftbook.interop as interop
from peftbook.adapters import Adapters
from peftbook.core import Tuner
from peftbook.full import Full
from peftbook.interop import from_hub, from_peft, model_card, push_to_hub, to_peft
from peftbook.lora import LoRA
from peftbook.models import generate, load_model, tiny_archs, tiny_model
from peftbook.prefix_tuning import PrefixTuning
from peftbook.prompt_tuning import PromptTuning
from peftbook.qlora import QLoRA
from peftbook.soft_prompting import SoftPrompting

peft = pytest.importorskip('peft')
pytestmark = pytest.mark.filterwarnings('ignore')
ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
ones = torch.ones_like(ids)

@pytest.fixture(autouse=True)
def offline(monkeypatch): # PEFT looks on the Hub whether a tiny model's name is there
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)

def shaken(tuner, arch='llama', seed=0):
    "A tiny model with a tuner whose tensors are off their start."
    torch.manual_seed(seed)
    m = tiny_model(arch)[0]
    tuner.attach(m)
    with torch.no_grad():
        for p in tuner.params.values(): p += .1*torch.randn_like(p)
    return m.eval(), tuner

def logits(m):
    with torch.no_grad(): return m(input_ids=ids, attention_mask=ones).logits.float()

def theirs(path, arch='llama', **kw): return peft.PeftModel.from_pretrained(tiny_model(arch)[0], path, **kw).eval()

def peft_made(cfg, arch='llama', seed=1):
    "A tiny model that PEFT made, its tensors off their start."
    torch.manual_seed(seed)
    m = peft.get_peft_model(tiny_model(arch)[0], cfg).eval()
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad: p += .1*torch.randn_like(p)
    return m

def keys(path):
    from safetensors import safe_open
    with safe_open(Path(path)/'adapter_model.safetensors', 'pt') as f: return {k: tuple(f.get_tensor(k).shape) for k in f.keys()}

def config(path): return json.loads((Path(path)/'adapter_config.json').read_text())
def reconfig(path, **kw): (Path(path)/'adapter_config.json').write_text(json.dumps(config(path) | kw))

def steps(m, n=3):
    "Plain AdamW. PEFT gives the logits of a prompt's vectors too: those of the row stand at the end."
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.)
    for _ in range(n):
        l = m(input_ids=ids, attention_mask=ones).logits[:, -ids.shape[1]:]
        cross_entropy(l[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        opt.step(); opt.zero_grad()

def files(path): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(path).iterdir()}
def state(m): return {n: t.clone() for n, t in m.state_dict().items()}

# --- ours, read by PEFT, and back

loras = [('llama', dict()), ('llama', dict(r=3, alpha=7.5, targets='all-linear', dropout=.1)), ('llama', dict(rslora=True, r=3)),
    ('llama', dict(targets='lm_head')), ('llama', dict(targets=['model.layers.0.*', 'o'])), ('llama', dict(targets='^model.layers.1.mlp')),
    ('llama', dict(init='pissa')), ('llama', dict(init='pissa', rslora=True, targets='qkvo')), ('qwen2', dict(targets=['q', 'down'])), ('opt', dict(targets=['qkvo', 'up'])),
    ('gpt2', dict()), ('gpt2', dict(targets='qkvo', r=2)), ('gpt2', dict(targets=['c_attn', 'c_fc'])), ('gpt2', dict(init='pissa', targets=['q', 'up'])),
    ('gptneox', dict()), ('gptneox', dict(rslora=True, targets='all-linear')), ('phi3', dict()), ('phi3', dict(targets=['v', 'up', 'o'], rslora=True)), ('phi3', dict(init='pissa'))]

@pytest.mark.parametrize('arch,kw', loras)
def test_our_lora_in_peft_and_back(arch, kw, tmp_path):
    m, t = shaken(LoRA(**kw), arch)
    to_peft(t, tmp_path/'a')
    want = logits(m)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*(missing|unexpected) adapter keys.*')
        p = theirs(tmp_path/'a', arch)
    assert (logits(p) - want).abs().max() < 2e-5
    back = from_peft(tmp_path/'a', m2 := tiny_model(arch)[0])
    assert (logits(m2) - want).abs().max() < 2e-5
    assert back.scale == pytest.approx(t.scale, rel=1e-12) and back.dropout == t.dropout and back.rslora == t.rslora
    p.save_pretrained(tmp_path/'b') # the same tensors by PEFT's own hand; it adds base tensors where the head is a target
    own = {k: s for k, s in keys(tmp_path/'b').items() if 'base_layer' not in k}
    assert keys(tmp_path/'a') == own
    assert config(tmp_path/'a').keys() == config(tmp_path/'b').keys()
    assert {k: v for k, v in config(tmp_path/'a').items() if k != 'target_modules'} == {k: v for k, v in config(tmp_path/'b').items() if k != 'target_modules'}
    assert set(config(tmp_path/'a')['target_modules']) == set(config(tmp_path/'b')['target_modules'])

def test_a_plain_lora_comes_back_the_same(tmp_path):
    m, t = shaken(LoRA(r=3, alpha=6, targets=['q_proj', 'v_proj'], dropout=.25))
    back = from_peft(to_peft(t, tmp_path/'a'), m2 := tiny_model()[0])
    assert back.config == t.config and back.tensors.keys() == t.tensors.keys()
    assert all(torch.equal(back.tensors[n], t.tensors[n]) for n in t.tensors) and torch.equal(logits(m2), logits(m))

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('make', [PromptTuning, PrefixTuning, lambda n: PrefixTuning(n, reparam=8)], ids=['prompt', 'prefix', 'prefix_mlp'])
def test_our_prompts_in_peft_and_back(arch, make, tmp_path):
    m, t = shaken(make(5), arch)
    to_peft(t, tmp_path/'a')
    p = theirs(tmp_path/'a', arch)
    assert (logits(p)[:, -6:] - logits(m)).abs().max() < 3e-5
    from_peft(tmp_path/'a', m2 := tiny_model(arch)[0])
    assert (logits(m2) - logits(m)).abs().max() < 3e-5
    p.save_pretrained(tmp_path/'b')
    assert keys(tmp_path/'a') == keys(tmp_path/'b') and config(tmp_path/'a') == config(tmp_path/'b')

# --- PEFT's, read here

peft_loras = [('llama', dict(target_modules=['q_proj', 'v_proj'])), ('llama', dict(target_modules='all-linear', use_rslora=True)), ('qwen2', dict(target_modules=r'.*\.1\.mlp\.(up|down)_proj')),
    ('llama', dict(target_modules=['q_proj', 'o_proj'], layers_to_transform=[1])), ('llama', dict(target_modules=['q_proj', 'v_proj'], exclude_modules=['layers.0.self_attn.q_proj'])),
    ('llama', dict(target_modules=['q_proj'], init_lora_weights='pissa')), ('gpt2', dict(target_modules=['c_attn'], init_lora_weights='pissa')),
    ('llama', dict(target_modules=['q_proj'], init_lora_weights='gaussian')), ('llama', dict(target_modules=['lm_head', 'q_proj'])), ('gpt2', dict(target_modules=['c_attn', 'mlp.c_proj'], fan_in_fan_out=True)),
    ('gptneox', dict(target_modules=['query_key_value'])), ('phi3', dict(target_modules=['qkv_proj', 'gate_up_proj'])), ('opt', dict(target_modules=['fc1', 'k_proj']))]

@pytest.mark.parametrize('arch,kw', peft_loras)
def test_pefts_lora_here(arch, kw, tmp_path):
    p = peft_made(peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=.1, task_type='CAUSAL_LM', **kw), arch)
    p.save_pretrained(tmp_path)
    t = from_peft(tmp_path, m := tiny_model(arch)[0])
    assert (logits(m) - logits(p)).abs().max() < 3e-5
    assert t.dropout == .1 and sum(e.new.updates()[0].A.requires_grad for e in t._edits) == len(t._edits) > 0
    m.eval()
    t.merge()
    assert (logits(m) - logits(p)).abs().max() < 5e-5

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('cfg', [lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type='CAUSAL_LM'), lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type='CAUSAL_LM'),
    lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type='CAUSAL_LM', prefix_projection=True, encoder_hidden_size=16)], ids=['prompt', 'prefix', 'projection'])
def test_pefts_prompts_here(arch, cfg, tmp_path):
    p = peft_made(cfg(), arch)
    p.save_pretrained(tmp_path)
    from_peft(tmp_path, m := tiny_model(arch)[0])
    assert (logits(m) - logits(p)[:, -6:]).abs().max() < 3e-5

# --- training goes on in the other library

@pytest.mark.parametrize('arch,make', [('llama', lambda: LoRA(r=3)), ('llama', lambda: LoRA(r=3, rslora=True, targets='all-linear')), ('gpt2', lambda: LoRA(r=3, targets=['c_attn'])),
    ('qwen2', lambda: PromptTuning(5)), ('llama', lambda: PrefixTuning(5))], ids=['lora', 'rslora', 'gpt2', 'prompt', 'prefix'])
def test_three_more_steps_in_either_library_agree(arch, make, tmp_path):
    m, t = shaken(make(), arch)
    to_peft(t, tmp_path/'a')
    start = logits(m)
    p = theirs_to_train(tmp_path/'a', arch)
    assert (logits(p)[:, -6:] - start).abs().max() < 3e-5
    steps(m); steps(p)
    assert (logits(m) - start).abs().max() > 1e-2 # they moved
    p.save_pretrained(tmp_path/'b')
    back = from_peft(tmp_path/'b', m2 := tiny_model(arch)[0]) # and home again
    assert (logits(m2) - logits(m)).abs().max() < 1e-3
    steps(m); steps(m2)
    assert (logits(m2) - logits(m)).abs().max() < 2e-3 and back.model is m2

def theirs_to_train(path, arch):
    "PEFT's own way on: `from_pretrained` trains no prompt, so those are made anew and filled."
    cfg = peft.PeftConfig.from_pretrained(path)
    if cfg.peft_type == 'LORA': return theirs(path, arch, is_trainable=True)
    cfg.inference_mode = False
    p = peft.get_peft_model(tiny_model(arch)[0], cfg).eval()
    peft.set_peft_model_state_dict(p, peft.load_peft_weights(path))
    return p

@pytest.mark.parametrize('arch,kw', [('llama', dict(init='pissa')), ('gpt2', dict()), ('phi3', dict(targets=['v', 'o']))])
def test_side_by_side_factors_train_on_in_peft_and_come_home(arch, kw, tmp_path):
    m, t = shaken(LoRA(r=2, **kw), arch)
    p = theirs(to_peft(t, tmp_path/'a'), arch, is_trainable=True)
    before = logits(p)
    steps(p)
    assert (logits(p) - before).abs().max() > 1e-3
    p.save_pretrained(tmp_path/'b')
    from_peft(tmp_path/'b', m2 := tiny_model(arch)[0])
    assert (logits(m2) - logits(p)).abs().max() < 3e-5

def test_a_fused_layers_other_rows_stay_zero_in_the_file(tmp_path):
    "Q and V of a fused layer: rank 2r, and not a number of K."
    from safetensors.torch import load_file
    m, t = shaken(LoRA(r=2), 'gpt2')
    B = load_file(to_peft(t, tmp_path/'a')/'adapter_model.safetensors')['base_model.model.transformer.h.0.attn.c_attn.lora_B.weight']
    assert B.shape == (96, 4) and B[32:64].abs().max() == 0 and B[:32, 2:].abs().max() == 0 and B[64:, :2].abs().max() == 0
    assert config(tmp_path/'a')['lora_alpha'] == 16 and config(tmp_path/'a')['r'] == 4

def test_layers_with_fewer_factors_are_filled_up_with_zeros(tmp_path):
    "vLLM and llama.cpp know one rank and one alpha: all layers have the same."
    m, t = shaken(LoRA(r=2, targets=['qv', 'o']), 'gpt2')
    to_peft(t, tmp_path/'a')
    assert {s[0] for k, s in keys(tmp_path/'a').items() if 'lora_A' in k} == {4}
    assert config(tmp_path/'a')['rank_pattern'] == {} and (logits(theirs(tmp_path/'a', 'gpt2')) - logits(m)).abs().max() < 2e-5

def test_qlora_goes_out_and_comes_in_on_the_quantized_base(tmp_path):
    m, t = shaken(QLoRA(r=2))
    to_peft(t, tmp_path/'a')
    from peftbook.quantization import quantize
    m2 = quantize(tiny_model()[0], **t.how())
    from_peft(tmp_path/'a', m2)
    assert torch.equal(logits(m2), logits(m))
    assert (logits(from_peft(tmp_path/'a', tiny_model()[0]).model) - logits(m)).abs().max() > 1e-3 # the dense base is another

def test_detached_and_attached_write_the_same(tmp_path):
    m, t = shaken(LoRA(r=2), 'phi3')
    def read(path): # the header's order is safetensors' own, and another each time
        cfg, have, header = interop._read_peft(path)
        return cfg, {n: x.tolist() for n, x in have.items()}, header
    a = read(to_peft(t, tmp_path/'a'))
    before = state(m)
    assert t.model is m and read(to_peft(t.detach(), tmp_path/'b')) == a
    t.attach(m)
    assert all(torch.equal(x, before[n]) for n, x in m.state_dict().items())

@pytest.mark.parametrize('arch', ['llama', 'gpt2', 'gptneox', 'phi3', 'opt'])
@pytest.mark.parametrize('targets', ['q', 'qv', 'qkvo', 'o', 'down', 'all-linear', 'lm_head', ['*.0.*']])
def test_names_of_targets_mean_these_layers_and_no_other(arch, targets, tmp_path):
    "By PEFT's own matching."
    from peft.tuners.tuners_utils import check_target_module_exists
    m, t = shaken(LoRA(r=1, targets=targets), arch)
    cfg = peft.LoraConfig.from_pretrained(to_peft(t, tmp_path/'a'))
    names = {n for n, _ in tiny_model(arch)[0].named_modules()}
    assert {n for n in names if check_target_module_exists(cfg, n)} == {e.name for e in t._edits}

# --- what others read

def test_vllm_and_llama_cpp_accept_it(tmp_path):
    "peft#2092, #2898: no base tensor, A and B alone, one rank that the shapes agree with, names that their converters split."
    m, t = shaken(LoRA(r=2, targets=['q', 'v', 'lm_head']))
    to_peft(t, tmp_path/'a')
    cfg, own = config(tmp_path/'a'), sum(p.numel()*4 for p in t.params.values())
    base = {n for n, _ in tiny_model()[0].named_parameters()}
    for k, s in keys(tmp_path/'a').items():
        layer, which = re.fullmatch(r'base_model\.model\.(.+)\.lora_([AB])\.weight', k).groups()
        assert f'{layer}.weight' in base and s[which == 'B'] == cfg['r']
        assert any(layer == t or layer.endswith(f'.{t}') for t in cfg['target_modules'])
    assert cfg['r'] == 2 and isinstance(cfg['lora_alpha'], int) and cfg['target_modules'] and cfg['bias'] == 'none' and not cfg['modules_to_save'] and not cfg['use_dora']
    size = (tmp_path/'a'/'adapter_model.safetensors').stat().st_size
    assert own < size < own + 300*(len(t.params) + 1)

def test_the_card_of_rslora_says_what_llama_cpp_needs(tmp_path):
    "Its converter reads lora_alpha alone and divides by r."
    m, t = shaken(LoRA(r=4, alpha=8, rslora=True))
    to_peft(t, tmp_path/'a')
    said = float(re.search(r'set `lora_alpha` to ([\d.]+)', (tmp_path/'a'/'README.md').read_text())[1])
    assert said/4 == pytest.approx(t.scale)
    assert 'rsLoRA' not in model_card(shaken(LoRA())[1])

# --- what is refused, and leaves everything as it was

def saved(tmp_path, arch='llama', tuner=None):
    m, t = shaken(tuner or LoRA(r=2), arch)
    return to_peft(t, tmp_path/'a')

def refused(path, words, m=None, exc=ValueError, **kw):
    m = m or tiny_model()[0]
    before, mods = state(m), dict(m.named_modules())
    with pytest.raises(exc, match=words) as e: from_peft(path, m, **kw)
    assert '\n' not in str(e.value)
    assert dict(m.named_modules()) == mods and not hasattr(m, 'tuner')
    now = m.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items()) and all(p.requires_grad for p in m.parameters())

def rewrite(path, change, header=dict(format='pt')):
    "The tensors file as PEFT would write it, changed."
    from safetensors.torch import load_file, save_file
    f = Path(path)/'adapter_model.safetensors'
    have = load_file(f)
    change(have)
    save_file({k: v.clone() for k, v in have.items()}, f, header)

def test_another_base_is_refused(tmp_path):
    path = saved(tmp_path)
    refused(path, 'another base.*tiny:llama:0.*weights differ', tiny_model(seed=1)[0])
    refused(path, 'layers differ', tiny_model('gpt2')[0])
    with pytest.warns(UserWarning, match='another base'): from_peft(path, tiny_model(seed=1)[0], base_mismatch='warn')
    refused(path, 'base_mismatch', base_mismatch='ignore')

def test_another_base_by_name_where_peft_wrote_the_file(tmp_path):
    peft_made(peft.LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM')).save_pretrained(tmp_path)
    refused(tmp_path, "trained on 'tiny:llama:0'.*this model is 'tiny:llama:1'", tiny_model(seed=1)[0])
    refused(tmp_path, 'base_mismatch', base_mismatch='no')
    with pytest.warns(UserWarning, match='tiny:llama:1'): from_peft(tmp_path, tiny_model(seed=1)[0], base_mismatch='warn')

key = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
@pytest.mark.parametrize('change,words', [
    (lambda h: h.pop(key), r'lacks model\.layers\.0\.self_attn\.q_proj\.lora\.A'),
    (lambda h: h.update({key.replace('q_proj', 'o_proj'): h[key]}), 'do not belong there.*o_proj'),
    (lambda h: h.update({key.replace('lora_A', 'lora_magnitude_vector'): h[key]}), 'do not belong there.*lora_magnitude_vector'),
    (lambda h: h.update({'base_model.model.model.embed_tokens.lora_embedding_A': h[key]}), 'do not belong there.*lora_embedding_A'),
    (lambda h: h.update({key: h[key][:1]}), r'is \(1, 32\), the model needs \(2, 32\)'),
    (lambda h: h.update({key: h[key].view(torch.int32)}), 'no floating-point numbers'),
    (lambda h: h.update({'base_model.model.lm_head.base_layer.weight': torch.zeros(3, 3)}), 'of its base, and this model has another'),
    (lambda h: h.update({'base_model.model.model.norm.weight': torch.zeros(32)}), 'of its base, and this model has another')])
def test_keys_missing_extra_or_of_another_shape(tmp_path, change, words):
    "peft#1932, #2566, #2699: named, not ignored."
    path = saved(tmp_path)
    rewrite(path, change)
    refused(path, words)

@pytest.mark.parametrize('kw,words', [
    (dict(use_dora=True), 'use_dora.*rescales'), (dict(bias='all'), 'bias.*biases'), (dict(modules_to_save=['lm_head']), 'modules_to_save.*whole modules'),
    (dict(rank_pattern={'q_proj': 4}), 'rank_pattern.*ranks of their own'), (dict(alpha_pattern={'q_proj': 4}), 'alpha_pattern'), (dict(lora_bias=True), 'lora_bias'),
    (dict(trainable_token_indices=[1]), 'trainable_token_indices'), (dict(something_of_2030='x'), 'something_of_2030.*no counterpart'), (dict(target_parameters=['a.b']), 'target_parameters'),
    (dict(peft_type='LOHA'), "'LOHA'.*LORA, PROMPT_TUNING, PREFIX_TUNING"), (dict(task_type='SEQ_CLS'), 'SEQ_CLS'), (dict(init_lora_weights='olora'), 'olora.*changed the base'),
    (dict(init_lora_weights='pissa_niter_4'), 'pissa_niter_4'), (dict(target_modules=['nonesuch']), 'names no linear layer'), (dict(target_modules='(('), 'cannot be read'), (dict(target_modules=7), 'cannot be read'),
    (dict(r=None), 'lacks r'), (dict(r='2'), "r='2'"), (dict(lora_alpha='much'), "'much'"), (dict(lora_alpha=float('inf')), 'inf is no finite number'), (dict(peft_type=['LORA']), 'can be read'), (dict(lora_dropout=2), 'dropout=2'), (dict(lora_dropout='x'), 'wrong kind'), (dict(r=3), r'\(2, 32\), the model needs \(3, 32\)')])
def test_options_without_a_counterpart(tmp_path, kw, words):
    path = saved(tmp_path)
    rewrite(path, lambda h: None) # without a seal, as PEFT's own
    reconfig(path, **kw)
    refused(path, words)

def test_options_off_or_unheard_of_do_no_harm(tmp_path):
    path = saved(tmp_path)
    reconfig(path, something_of_2030=None, another=False, runtime={})
    assert from_peft(path, tiny_model()[0]).r == 2

def test_prompts_that_do_not_fit(tmp_path):
    path = saved(tmp_path, tuner=PrefixTuning(4))
    rewrite(path, lambda h: None)
    for kw, words in ((dict(num_virtual_tokens=5), r'\(4, 64\).*\(5, 64\)'), (dict(num_attention_heads=3), r'\(4, 64\)'), (dict(num_attention_heads=1), 'the model needs'), (dict(token_dim=None), 'lacks token_dim'),
        (dict(num_transformer_submodules=2), 'encoder'), (dict(num_virtual_tokens='x'), 'no whole numbers'), (dict(num_attention_heads=0), 'no whole numbers')):
        was = config(path)
        reconfig(path, **kw); refused(path, words); reconfig(path, **was)
    other = to_peft(shaken(PromptTuning(4))[1], tmp_path/'b')
    rewrite(other, lambda h: h.update(more=torch.zeros(1)))
    refused(other, 'do not belong there, more')
    rewrite(other, lambda h: (h.pop('more'), h.pop('prompt_embeddings'), h.update(other=torch.zeros(1))))
    refused(other, 'lacks prompt')

def header_of(path):
    data = (path/'adapter_model.safetensors').read_bytes()
    n = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8:8+n]), data[8+n:]

def with_header(path, head, body, n=None):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    (path/'adapter_model.safetensors').write_bytes(struct.pack('<Q', n or len(text)) + text + body)

@pytest.mark.parametrize('sealed', [True, False])
def test_tampered_header(tmp_path, sealed):
    "Lengths, offsets, types and names; what stays a valid file is caught by the seal where there is one."
    path = saved(tmp_path)
    if not sealed: rewrite(path, lambda h: None)
    head, body = header_of(path)
    for n in (len(body)*9, 2**63, 3): with_header(path, head, body, n); refused(path, 'cannot be read as safetensors')
    with_header(path, b'{"a": ', body); refused(path, 'cannot be read as safetensors')
    for part in (dict(data_offsets=[0, 10**9]), dict(data_offsets=[8, 4]), dict(shape=[2, 31]), dict(dtype='F64'), dict(dtype='X')):
        with_header(path, head | {key: head[key] | part}, body); refused(path, 'cannot be read as safetensors')
    with_header(path, head, body[:-1]); refused(path, 'cannot be read as safetensors')
    with_header(path, head | {'__metadata__': {'x': 7}}, body); refused(path, 'cannot be read as safetensors')
    with_header(path, head | {key: head[key] | dict(dtype='I32')}, body); refused(path, 'SHA-256' if sealed else 'floating-point')
    if not sealed: return
    other = key.replace('layers.0', 'layers.1')
    with_header(path, head | {key: head[other], other: head[key]}, body); refused(path, 'SHA-256')
    with_header(path, head, body[:-1] + bytes([body[-1] ^ 1])); refused(path, 'SHA-256')
    with_header(path, head | {'__metadata__': head['__metadata__'] | dict(base='0'*33)}, body); refused(path, 'another base')
    with_header(path, head, body)
    was = config(path)
    reconfig(path, lora_alpha=800); refused(path, 'SHA-256')
    reconfig(path, **was); from_peft(path, tiny_model()[0])

def test_damaged_folders(tmp_path):
    refused(tmp_path, 'adapter_config.json is missing', exc=FileNotFoundError)
    m, t = shaken(LoRA())
    t.save(tmp_path/'own')
    refused(tmp_path/'own', 'Tuner.load', exc=FileNotFoundError)
    path = saved(tmp_path)
    (path/'adapter_config.json').write_text('{'); refused(path, 'not valid JSON')
    (path/'adapter_config.json').write_bytes(b'\xff\xfe{'); refused(path, 'not valid JSON')
    for text in ('[]', '{}'): (path/'adapter_config.json').write_text(text); refused(path, 'peft_type')
    (path/'adapter_model.safetensors').rename(path/'adapter_model.bin'); refused(path, 'pickle', exc=FileNotFoundError)

def test_a_model_with_a_tuner_keeps_it(tmp_path):
    path = saved(tmp_path)
    m, t = shaken(PrefixTuning(3))
    before = logits(m)
    with pytest.raises(ValueError, match='carries prefix_tuning already'): from_peft(path, m)
    assert m.tuner is t and torch.equal(logits(m), before)

@pytest.mark.parametrize('make', [Adapters, Full, lambda: SoftPrompting('be kind', n_shots=0)], ids=['adapters', 'full', 'soft_prompting'])
def test_methods_that_peft_does_not_know(tmp_path, make):
    t = make().attach(tiny_model()[0])
    with pytest.raises(ValueError, match=f'{t.name} has no counterpart in PEFT'): to_peft(t, tmp_path/'a')
    assert not (tmp_path/'a').exists()
    t.detach()

def test_a_tuner_without_tensors(tmp_path):
    with pytest.raises(ValueError, match='attach'): to_peft(LoRA(), tmp_path/'a')

# --- files whole or not at all

def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    m, t = shaken(LoRA())
    def full(path, data, n=[]):
        n.append(path)
        if len(n) % 3 == 0: raise OSError(errno.ENOSPC, 'No space left on device')
        Path(path).parent.mkdir(parents=True, exist_ok=True); Path(path).write_bytes(data)
    monkeypatch.setattr(interop, 'write_atomic', full)
    with pytest.raises(OSError, match='No space left.*nothing was written.*new'): to_peft(t, tmp_path/'new')
    assert list(tmp_path.iterdir()) == []
    (tmp_path/'old').mkdir(); (tmp_path/'old'/'README.md').write_text('mine')
    with pytest.raises(OSError, match='nothing was written'): to_peft(t, tmp_path/'old')
    assert files(tmp_path/'old').keys() == {'README.md'} and (tmp_path/'old'/'README.md').read_text() == 'mine'

def test_folders_that_hold_something_else(tmp_path):
    m, t = shaken(LoRA())
    (tmp_path/'f').write_text('x')
    with pytest.raises(FileExistsError, match='is a file'): to_peft(t, tmp_path/'f')
    t.save(tmp_path/'own')
    before = files(tmp_path/'own')
    with pytest.raises(FileExistsError, match='own format'): to_peft(t, tmp_path/'own')
    assert files(tmp_path/'own') == before and Tuner.load(tmp_path/'own', tiny_model()[0])
    to_peft(t, tmp_path/'deep'/'er'); to_peft(t, tmp_path/'deep'/'er')
    assert files(tmp_path/'deep'/'er').keys() == {'adapter_config.json', 'adapter_model.safetensors', 'README.md'}
    assert [p.name for p in (tmp_path/'deep').iterdir()] == ['er']

def test_bad_cards_write_nothing(tmp_path):
    m, t = shaken(LoRA())
    for kw, words in ((dict(task='two\nlines'), 'one line'), (dict(scores=dict(score='high')), "'high'"), (dict(scores=dict(score=(1, 2))), 'score'), (dict(scores=dict(score=float('nan'))), 'score'), (dict(scores=dict(score=[])), 'score')):
        with pytest.raises(ValueError, match=words): to_peft(t, tmp_path/'a', **kw)
    assert not (tmp_path/'a').exists()

# --- the card

def test_card(tmp_path):
    import yaml
    m, t = shaken(LoRA(r=2))
    text = model_card(t, 'airline', dict(score=(.91, .85, .96), loss=1.25))
    head = yaml.safe_load(text.split('---')[1])
    assert head['library_name'] == 'peft' and head['pipeline_tag'] == 'text-generation' and 'lora' in head['tags']
    assert 'base_model' not in head and '`tiny:llama:0`' in text # not a name on the Hub
    for s in ('| method | lora |', repr(t), '| task | airline |', '| score | 0.91 | 0.85 to 0.96 |', '| loss | 1.25 | |', t.base['fingerprint'], '--max-lora-rank` 2'): assert s in text
    assert 'not stated' in model_card(t) and 'None were given' in model_card(t)
    t.base['name'] = 'HuggingFaceTB/SmolLM2-135M-Instruct'
    assert yaml.safe_load(model_card(t).split('---')[1])['base_model'] == t.base['name']
    t.base['name'] = '/home/somebody/secret/model'
    assert 'secret' not in model_card(t) and '`model`' in model_card(t)
    assert 'vLLM and llama.cpp read LoRA only' in model_card(shaken(PromptTuning(3))[1])

def test_the_hub_reads_the_card(tmp_path):
    from huggingface_hub import ModelCard
    m, t = shaken(LoRA(r=2))
    t.base['name'] = 'a/b'
    data = ModelCard(model_card(t, 'airline')).data
    assert data.base_model == 'a/b' and data.library_name == 'peft'

# --- the Hub, played by a folder

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "huggingface_hub's own signatures, with a folder behind them."
    import huggingface_hub as hf
    root = tmp_path/'hub'
    api = mock.create_autospec(hf.HfApi, instance=True)
    def create(repo_id, **kw): (root/repo_id).mkdir(parents=True, exist_ok=kw['exist_ok']); return f'https://hub.test/{repo_id}'
    def upload(*, repo_id, folder_path, **kw): shutil.copytree(folder_path, root/repo_id, dirs_exist_ok=True)
    def fetch(repo_id, **kw):
        if not (root/repo_id).is_dir(): raise hf.errors.LocalEntryNotFoundError('no network')
        return str(root/repo_id)
    api.create_repo.side_effect, api.upload_folder.side_effect = create, upload
    monkeypatch.setattr(hf, 'HfApi', lambda: api)
    monkeypatch.setattr(hf, 'snapshot_download', mock.create_autospec(hf.snapshot_download, side_effect=fetch))
    return root, api

def test_push_and_pull(hub):
    import huggingface_hub as hf
    root, api = hub
    m, t = shaken(LoRA(r=2))
    assert push_to_hub(t, 'me/airline', 'airline', dict(score=.9), private=True) == 'https://hub.test/me/airline'
    assert api.create_repo.call_args.kwargs['private'] is True and api.upload_folder.call_count == 1
    assert files(root/'me/airline').keys() == {'adapter_config.json', 'adapter_model.safetensors', 'README.md'}
    from_hub('me/airline', m2 := tiny_model()[0], revision='v1')
    assert torch.equal(logits(m2), logits(m))
    kw = hf.snapshot_download.call_args.kwargs
    assert kw['revision'] == 'v1' and not any(p.endswith(('.bin', '.py', '*')) for p in kw['allow_patterns'])

def test_what_cannot_be_pushed_makes_no_repository(hub):
    root, api = hub
    with pytest.raises(ValueError, match='no counterpart'): push_to_hub(Adapters().attach(tiny_model()[0]), 'me/x')
    with pytest.raises(ValueError, match='one line'): push_to_hub(shaken(LoRA())[1], 'me/x', task='a\nb')
    assert not api.create_repo.called

def test_hub_errors_in_one_line(hub):
    import huggingface_hub as hf
    def fails(e, exc, words):
        with mock.patch.object(hf, 'snapshot_download', side_effect=e), pytest.raises(exc, match=words) as i: from_hub('me/x', tiny_model()[0])
        assert '\n' not in str(i.value)
    response = mock.Mock(headers={}, status_code=404)
    def http(cls): return cls('gone', response=response)
    with pytest.raises(OSError, match="can't be reached.*connect once"): from_hub('me/nothing', tiny_model()[0])
    fails(http(hf.errors.RepositoryNotFoundError), ValueError, "no public adapter 'me/x'")
    fails(http(hf.errors.GatedRepoError), OSError, 'gated')
    fails(http(hf.errors.RevisionNotFoundError), ValueError, 'no revision')

def test_failed_uploads_in_one_line(hub):
    import huggingface_hub as hf
    root, api = hub
    m, t = shaken(LoRA())
    for e, exc, words in ((ConnectionError('no\nroute'), OSError, "'me/x' was not uploaded .*no route.*hf auth login"), (hf.errors.HFValidationError('bad'), ValueError, 'no name on the Hub')):
        api.create_repo.side_effect = e
        with pytest.raises(exc, match=words) as i: push_to_hub(t, 'me/x')
        assert '\n' not in str(i.value) and not api.upload_folder.called

def test_a_name_that_is_none_says_so():
    with pytest.raises(ValueError, match='no name on the Hub'): from_hub('/not/a name', tiny_model()[0])

def test_the_real_client_without_a_network():
    with pytest.raises(OSError, match="can't be reached"): from_hub('nobody/nothing-of-the-kind', tiny_model()[0])

# --- a tuned model is a Hugging Face model

@pytest.mark.parametrize('arch,make', [('llama', lambda: LoRA(targets='all-linear')), ('gpt2', LoRA), ('qwen2', lambda: LoRA(targets='lm_head')), ('llama', Adapters), ('llama', lambda: QLoRA(r=2))], ids=['lora', 'gpt2', 'tied_head', 'adapters', 'qlora'])
def test_merged_folder_is_plain_transformers(arch, make, tmp_path):
    "peft#2018 with a tied head."
    from transformers import AutoModelForCausalLM
    m, t = shaken(make(), arch)
    before = logits(m)
    if t.unmergeable: return pytest.raises(TypeError, t.merge)
    t.merge()
    m.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and type(plain) is type(m)
    assert (logits(plain.eval()) - before).abs().max() < 1e-4
    assert not any('lora' in n for n in plain.state_dict())

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return dict(input_ids=ids[i % 2], attention_mask=ones[0], labels=ids[i % 2])

@pytest.mark.parametrize('make', [LoRA, lambda: PromptTuning(4), lambda: PrefixTuning(4), Adapters], ids=['lora', 'prompt', 'prefix', 'adapters'])
def test_transformers_trainer_trains_the_tuner_alone(make, tmp_path):
    from transformers import Trainer, TrainingArguments
    torch.manual_seed(0)
    m = tiny_model()[0]
    before = state(m)
    t = make().attach(m)
    start = {n: p.detach().clone() for n, p in t.params.items()}
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], save_strategy='no', use_cpu=True, disable_tqdm=True)
    tr = Trainer(model=m, args=args, train_dataset=Rows())
    first = tr.evaluate(Rows())['eval_loss']
    tr.train()
    assert tr.evaluate(Rows())['eval_loss'] < first
    assert any(not torch.equal(p, start[n]) for n, p in t.params.items())
    t.detach()
    assert all(torch.equal(x, before[n]) for n, x in m.state_dict().items())

@pytest.mark.parametrize('make,kw', [(LoRA, {}), (lambda: PrefixTuning(4), dict(gradient_checkpointing=False))], ids=['lora', 'prefix'])
def test_trl_sft_trainer(make, kw, tmp_path):
    trl = pytest.importorskip('trl')
    datasets = pytest.importorskip('datasets')
    torch.manual_seed(0)
    m, tok = tiny_model()
    before = state(m)
    t = make().attach(m)
    start = {n: p.detach().clone() for n, p in t.params.items()}
    rows = datasets.Dataset.from_list([dict(prompt=[dict(role='user', content=f'say {a}')], completion=[dict(role='assistant', content=a)]) for a in 'aaaaaaaa'])
    args = trl.SFTConfig(output_dir=str(tmp_path), max_steps=4, lr_scheduler_type='constant', per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], save_strategy='no', use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, **kw)
    tr = trl.SFTTrainer(model=m, args=args, train_dataset=rows, processing_class=tok)
    tr.train()
    losses = [h['loss'] for h in tr.state.log_history if 'loss' in h]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) # the same row each time
    assert any(not torch.equal(p.cpu(), start[n]) for n, p in t.params.items())
    to_peft(t, tmp_path/'a')
    t.detach()
    assert all(torch.equal(x, before[n]) for n, x in m.state_dict().items())
    from_peft(tmp_path/'a', tiny_model()[0])

def test_trl_with_a_prefix_says_that_checkpointing_must_be_off(tmp_path):
    "peft#869: TRL turns it on by default."
    trl, datasets = pytest.importorskip('trl'), pytest.importorskip('datasets')
    m, tok = tiny_model()
    PrefixTuning(4).attach(m)
    args = trl.SFTConfig(output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy='no', use_cpu=True, bf16=False, disable_tqdm=True)
    tr = trl.SFTTrainer(model=m, args=args, train_dataset=datasets.Dataset.from_list([dict(text='hello there')]*2), processing_class=tok)
    with pytest.raises(ValueError, match='checkpointing'): tr.train()

@pytest.mark.parametrize('make', [LoRA, lambda: PromptTuning(4), lambda: PrefixTuning(4)], ids=['lora', 'prompt', 'prefix'])
def test_text_generation_pipeline(make):
    from transformers import pipeline
    m, t = shaken(make())
    tok = tiny_model()[1]
    pipe = pipeline('text-generation', model=m, tokenizer=tok)
    chat = [dict(role='user', content='hello there')]
    said = pipe(chat, max_new_tokens=8, do_sample=False)[0]['generated_text'][-1]['content']
    assert said.strip() == generate(m, tok, [chat], max_new_tokens=8)[0]
    t.detach()
    assert pipe(chat, max_new_tokens=8, do_sample=False)[0]['generated_text'][-1]['content'] != said

def test_merged_model_compiles_and_exports_without_a_break():
    m, t = shaken(LoRA())
    t.merge()
    want = logits(m)
    with torch.no_grad():
        whole = torch.compile(m, backend='aot_eager', fullgraph=True)
        assert (whole(input_ids=ids, use_cache=False).logits - want).abs().max() < 1e-5
        prog = torch.export.export(m, (), dict(input_ids=ids, use_cache=False), strict=False)
        assert (prog.module()(input_ids=ids, use_cache=False).logits - want).abs().max() < 1e-5
    assert not any('lora' in n for n in prog.state_dict)

def test_no_peft_and_no_hub_at_import():
    import subprocess, sys
    code = "import sys, peftbook.interop; print([o for o in ('peft', 'huggingface_hub', 'transformers', 'safetensors') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'
    assert 'import peft\n' not in Path(interop.__file__).read_text() and 'from peft ' not in re.sub(r"'from peft [^']*'", '', Path(interop.__file__).read_text())
