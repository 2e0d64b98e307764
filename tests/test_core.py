"The protocol, where the chapter's cells don't reach: files under attack, failures in the middle, other precisions."
import errno, json, os
from copy import deepcopy

import pytest, torch
from safetensors.torch import load_file, save_file

import peftbook.core as core
from peftbook.core import *
from peftbook.lora import LoRA
from peftbook.models import tiny_archs, tiny_model

ids = torch.tensor([[5, 6, 7, 8, 9]])

def logits(m):
    with torch.no_grad(): return m(input_ids=ids).logits

def trained(model, **kw):
    "A LoRA whose tensors are off their start."
    t = LoRA(**kw).attach(model)
    for p in t.params.values(): torch.nn.init.normal_(p, std=.1)
    return t

@pytest.fixture
def model(): return tiny_model('llama')[0]

@pytest.fixture
def saved(model, tmp_path):
    trained(model).save(tmp_path/'a')
    model.tuner.detach()
    return tmp_path/'a'

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('kw', [dict(), dict(targets='all-linear', r=2, rslora=True), dict(init='pissa')])
def test_battery(arch, kw): assert len(check_tuner(LoRA(**kw), tiny_model(arch)[0])) == 9

def test_missing_keys_raise(model, saved):
    "peft#1932, #2566, #2699: a missing key must not load in silence."
    info = json.loads((saved/'tuner.json').read_text())
    t = load_file(saved/'adapter_model.safetensors')
    t.pop(next(iter(t)))
    rewrite(saved, info, t)
    before = logits(model)
    with pytest.raises(ValueError, match='lacks .*nothing was loaded'): Tuner.load(saved, model)
    assert not hasattr(model, 'tuner') and torch.equal(logits(model), before)

def rewrite(folder, info, tensors):
    "Write tensors with a matching hash, as an attacker or another program would."
    import hashlib
    save_file(tensors, folder/'adapter_model.safetensors')
    data = (folder/'adapter_model.safetensors').read_bytes()
    (folder/'tuner.json').write_text(json.dumps(info | dict(sha256=hashlib.sha256(data).hexdigest())))

def test_wrong_shape_raises(model, saved):
    info, t = json.loads((saved/'tuner.json').read_text()), load_file(saved/'adapter_model.safetensors')
    k = next(iter(t))
    t[k] = t[k][:2].contiguous()
    rewrite(saved, info, t)
    with pytest.raises(ValueError, match='the model needs'): Tuner.load(saved, model)

@pytest.mark.parametrize('damage', [lambda b: b[:-7], lambda b: b[:9] + b'!' + b[10:], lambda b: b''])
def test_tampered_file_raises(model, saved, damage):
    f = saved/'adapter_model.safetensors'
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(ValueError, match='truncated or was changed'): Tuner.load(saved, model)
    assert not hasattr(model, 'tuner')

def test_other_base_raises_or_warns(saved):
    other = tiny_model('llama', seed=3)[0]
    with pytest.raises(ValueError, match='another base'): Tuner.load(saved, other)
    with pytest.warns(UserWarning, match='another base'): Tuner.load(saved, other, base_mismatch='warn')

def test_reloaded_adapter_trains(model, saved):
    "peft#282: a reloaded adapter must not be frozen."
    t = Tuner.load(saved, model)
    assert t.params and all(p.requires_grad for p in t.params.values())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in t.params.values()}

def test_file_holds_no_base_weight(model, saved):
    "peft#2092, #2898: the delta's file is its own numbers and a header."
    n = LoRA().cost(model)['trained']
    size = (saved/'adapter_model.safetensors').stat().st_size
    assert 4*n < size < 4*n + 4000
    assert not {k for k in load_file(saved/'adapter_model.safetensors') if not k.endswith(('.A', '.B'))}

def test_full_disk_leaves_the_old_file(model, saved, monkeypatch):
    old = {f.name: f.read_bytes() for f in saved.iterdir()}
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(core.os, 'fsync', full)
    t = trained(model)
    with pytest.raises(OSError, match='No space left.*nothing was written.*adapter_model'): t.save(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == old

def test_attach_that_fails_changes_nothing(model):
    class Clumsy(LoRA):
        def edits(self, model):
            yield from super().edits(model)
            yield Hook('model.norm', lambda *a: None, params=dict(weight=torch.nn.Parameter(torch.ones(1)))) # the name is taken
    state, before = [n for n, _ in model.named_parameters()], logits(model)
    with pytest.raises(ValueError, match="attribute 'weight' already"): Clumsy().attach(model)
    assert [n for n, _ in model.named_parameters()] == state and torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, 'tuner')
    core.methods.pop('clumsy')

def test_unknown_target_lists_the_names():
    "peft#2991: a target that matches nothing raises and says what there is."
    with pytest.raises(ValueError, match='c_attn, c_fc, c_proj'): LoRA(targets='q_proj').attach(tiny_model('gpt2')[0])

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_adapters_stay_fp32(dtype):
    "peft#1249: adapters in fp16 diverge; they are fp32 whatever the base's precision."
    m = tiny_model('llama', dtype=dtype)[0]
    t = trained(m)
    assert {p.dtype for p in t.params.values()} == {torch.float32} and logits(m).dtype == dtype

def test_bf16_merge_is_rounded_once(model):
    "peft#1388: the sum is taken in fp32; what is left is one rounding, and it is reported."
    m = deepcopy(model).to(torch.bfloat16)
    t = trained(m)
    lin = m.model.layers[0].self_attn.q_proj
    exact = lin.base.weight.float() + lin.delta()
    report = t.merge()
    got = m.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(got, exact.to(torch.bfloat16))
    assert 0 < (got.float() - exact).abs().max() <= report['max_rounding'] < 2**-8*exact.abs().max()*2

def test_merged_model_is_a_plain_folder(model, tmp_path):
    from transformers import AutoModelForCausalLM
    t = trained(model, targets='all-linear')
    tuned = logits(model)
    t.merge()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(again) - tuned).abs().max() < 1e-5

def test_merged_tied_head_is_a_plain_folder(tmp_path):
    "peft#2018: merging into a tied head must reach the head alone, in the saved folder too."
    from transformers import AutoModelForCausalLM
    m = tiny_model('gpt2')[0]
    assert m.lm_head.weight is m.transformer.wte.weight
    emb = m.transformer.wte.weight.detach().clone()
    t = trained(m, targets='lm_head')
    tuned = logits(m)
    t.merge()
    m.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(again) - tuned).abs().max() < 1e-5
    assert torch.equal(again.transformer.wte.weight, emb)

def test_meta_model_counts():
    with torch.device('meta'): m = deepcopy(tiny_model('llama')[0]).to('meta')
    assert LoRA().cost(m)['trained'] == LoRA().cost(tiny_model('llama')[0])['trained']
