"LoRA against Hugging Face PEFT with the weights copied over: logits, gradients, merged weights."
import pytest, torch
from torch.nn.functional import cross_entropy

from peftbook.lora import LoRA
from peftbook.models import tiny_model

peft = pytest.importorskip('peft')
ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
cases = [('llama', ['q_proj', 'v_proj']), ('qwen2', ['q_proj', 'v_proj', 'down_proj']), ('gpt2', ['c_attn', 'c_fc']),
         ('gptneox', ['query_key_value']), ('phi3', ['qkv_proj', 'gate_up_proj']), ('opt', ['q_proj', 'fc1'])]

def pair(arch, targets, rslora, dtype=torch.float32):
    "The same base twice, with the same LoRA weights in ours and in PEFT's."
    ours, theirs = tiny_model(arch, dtype=dtype)[0], tiny_model(arch, dtype=dtype)[0]
    t = LoRA(r=3, alpha=6, targets=targets, rslora=rslora).attach(ours)
    for p in t.params.values(): torch.nn.init.normal_(p, std=.1)
    cfg = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_rslora=rslora, lora_dropout=0., fan_in_fan_out=arch == 'gpt2')
    theirs = peft.get_peft_model(theirs, cfg, autocast_adapter_dtype=True).eval()
    with torch.no_grad():
        for n, p in t.params.items(): theirs_param(theirs, n).copy_(p)
    return ours, theirs, t

def theirs_param(model, name):
    layer, which = name.rsplit('.lora.', 1)
    return model.get_parameter(f'base_model.model.{layer}.lora_{which}.default.weight')

@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize('arch,targets', cases)
def test_parity(arch, targets, rslora):
    ours, theirs, t = pair(arch, targets, rslora)
    a, b = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert (a - b).abs().max() < 1e-5
    for l in (a, b): cross_entropy(l[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for n, p in t.params.items():
        assert (p.grad - theirs_param(theirs, n).grad).abs().max() < 1e-5*max(1, p.grad.abs().max().item()), n
    t.merge()
    merged = theirs.merge_and_unload()
    for (n, p), (m, q) in zip(ours.named_parameters(), merged.named_parameters()):
        assert n == m and (p - q).abs().max() < 1e-6, n

def test_three_steps_agree():
    "Three AdamW steps from the same start end at the same weights."
    ours, theirs, t = pair('llama', ['q_proj', 'v_proj'], False)
    for m in (ours, theirs):
        opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.)
        for _ in range(3):
            l = m(input_ids=ids).logits
            cross_entropy(l[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            opt.step(); opt.zero_grad()
    assert max((p - theirs_param(theirs, n)).abs().max() for n, p in t.params.items()) < 1e-5

def test_fused_rows_equal_split_layers():
    "Q and V of a fused layer: the update touches their rows alone (peft#193 for Conv1D)."
    for arch in ('gpt2', 'gptneox', 'phi3'):
        m = tiny_model(arch)[0]
        t = LoRA(r=2).attach(m)
        for p in t.params.values(): torch.nn.init.normal_(p)
        from peftbook.core import _rows, _suffix, _fused
        for e in t._edits:
            k = _rows(m.config, e.new.base, e.name, _suffix(e.name, _fused))['k']
            assert e.new.delta()[k].abs().max() == 0 and e.new.delta().abs().max() > 0

def test_dropout_is_seeded_and_off_in_eval():
    m = tiny_model('llama')[0]
    t = LoRA(dropout=.5).attach(m)
    for p in t.params.values(): torch.nn.init.normal_(p)
    m.train()
    def run(seed): torch.manual_seed(seed); return m(input_ids=ids).logits
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    m.eval()
    assert torch.equal(run(0), run(1))

def test_rank_greater_than_the_layer_names_it():
    with pytest.raises(ValueError, match=r'model.layers.0.self_attn.v_proj.*r=20.*16 x 32'): LoRA(r=20).attach(tiny_model('llama')[0])
