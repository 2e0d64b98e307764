"Plans against torch's allocator, against published counts, and against what papers report."
import re, subprocess, sys, time
import pytest, torch
import torch.nn.functional as F
from peftbook.core import checkpoint_activations, find_sites, methods
from peftbook.costs import peak_bytes
from peftbook.models import load_model, tiny_model
from peftbook.full import Full
from peftbook.adapters import Adapters
from peftbook.lora import LoRA
from peftbook.prompt_tuning import PromptTuning
from peftbook.prefix_tuning import PrefixTuning
from peftbook.qlora import QLoRA
from peftbook.quantization import quantize, storage_bytes
from peftbook.planner import *
from peftbook import planner

seq = 96 # long enough that activations outweigh what kernels take on the way
layered, front = ('adapters', 'lora'), ('prompt_tuning', 'prefix_tuning')
combinations = ([('full', None, c) for c in (False, True)] + [(m, b, c) for m in layered for b in (None, 4) for c in (False, True)] +
                [('qlora', None, c) for c in (False, True)] + [(m, b, False) for m in (*front, 'soft_prompting') for b in (None, 4)])

def against(model, name, t, batch=1, seq=seq, bits=None, checkpointing=False, supervised=None):
    "The plan, and the bytes measured."
    with torch.no_grad(): model(torch.zeros(1, 2, dtype=torch.int64)) # the first use of quantized layers tries out two backends
    p = plan(name, t, batch, seq, supervised, dtype=model.dtype, bits=bits, checkpointing=checkpointing, device='cpu')
    if t.lr is not None: t.attach(model)
    if checkpointing: checkpoint_activations(model)
    return p, measured(model, batch, seq, supervised)

@pytest.mark.parametrize('batch', (1, 4))
@pytest.mark.parametrize('name, bits, checkpointing', combinations)
def test_every_combination_is_within_ten_percent(name, bits, checkpointing, batch):
    model = tiny_model('llama')[0]
    if bits: quantize(model, bits)
    p, real = against(model, 'tiny:llama:0', methods[name](), batch, bits=bits, checkpointing=checkpointing)
    assert abs(p.total/real - 1) < .1

@pytest.mark.parametrize('arch', ('gpt2', 'qwen2', 'gptneox', 'phi3', 'opt'))
def test_other_architectures(arch):
    p, real = against(tiny_model(arch)[0], f'tiny:{arch}:0', LoRA(targets='all-linear'), 2)
    assert abs(p.total/real - 1) < .05

def small(kind):
    import transformers as tf
    usual = dict(vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, max_position_embeddings=512)
    if kind == 'mixtral': return tf.MixtralConfig(**usual, num_key_value_heads=2, num_local_experts=4)
    return tf.DeepseekV2Config(**usual, num_key_value_heads=4, moe_intermediate_size=64, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8,
                               v_head_dim=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1)

@pytest.mark.parametrize('kind', ('mixtral', 'deepseek'))
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_experts_and_latent_attention(kind, dtype):
    from transformers import AutoModelForCausalLM
    cfg = small(kind)
    p, real = against(AutoModelForCausalLM.from_config(cfg, dtype=dtype), cfg, LoRA(targets='o_proj'), 2)
    assert abs(p.total/real - 1) < .05

@pytest.fixture(scope='module')
def smol(): return load_model()[0]

@pytest.mark.parametrize('t, batch, checkpointing', ((LoRA(), 1, False), (LoRA(), 4, True), (PromptTuning(), 1, False), (methods['soft_prompting'](), 4, False)))
def test_the_real_model(smol, t, batch, checkpointing):
    "The model alone is most of it, so what is above it is held to the ten percent too."
    own = storage_bytes(smol)
    try:
        p, real = against(smol, 'smollm2-135m', t, batch, 32, checkpointing=checkpointing)
        assert abs(p.total/real - 1) < .02 and abs((p.total - own)/(real - own) - 1) < .1
    finally:
        checkpoint_activations(smol, False)
        if t.model is not None: t.detach()

def test_fewer_supervised_tokens_mean_fewer_logits():
    model = tiny_model('llama')[0]
    p, real = against(model, 'tiny:llama:0', LoRA(), 4, supervised=8)
    model.tuner.detach()
    q, real_all = against(model, 'tiny:llama:0', LoRA(), 4)
    assert abs(p.total/real - 1) < .1 and p.total < q.total and real < real_all

def test_checkpointing_switched_off_leaves_nothing_behind():
    "transformers' own switch leaves a hook, for which activations below the first trained layer are kept."
    peaks = []
    for again in (False, True):
        model = tiny_model('gptneox')[0]
        if again: checkpoint_activations(model); checkpoint_activations(model); checkpoint_activations(model, False)
        Adapters(bottleneck=8).attach(model)
        peaks.append(measured(model, 2, seq))
    assert abs(peaks[1]/peaks[0] - 1) < .02

# ---- figures that others published

published = {'llama-7b': 6_738_415_616, 'llama-13b': 13_015_864_320, 'llama-65b': 65_285_660_672, 'llama-2-70b': 68_976_648_192, 'llama-3.1-8b': 8_030_261_248,
             'llama-3.1-70b': 70_553_706_496, 'mistral-7b': 7_241_732_096, 'mixtral-8x7b': 46_702_792_704, 'qwen2.5-0.5b': 494_032_768, 'qwen2.5-7b': 7_615_616_512,
             'deepseek-v2-lite': 15_706_484_224, 'smollm2-135m': 134_515_008, 'gpt2': 124_439_808, 'gpt2-xl': 1_557_611_200}

@pytest.mark.parametrize('name', published)
def test_shapes_have_the_published_number_of_weights(name): assert planner._empty(name, torch.bfloat16, None)[2] == published[name]

def test_qlora_fits_65b_on_48_gb():
    p = plan('llama-65b', QLoRA(r=16), batch=1, seq=512, checkpointing=True)
    assert 33e9 < p.total < 48e9 # 33 GB are the codes alone: 65e9 x 4 bits and the dense head
    dense = plan('llama-65b', 'full', batch=1, seq=512, checkpointing=True)
    assert dense.total > 780e9 # as the paper says of full fine-tuning

def test_loras_checkpoint_of_gpt3():
    p = plan('gpt-3-175b', LoRA(r=4), batch=1, seq=64)
    assert p.trained == 2*2*4*12288*96 # two matrices, A and B, for queries and values
    assert abs(2*p.trained/35e6 - 1) < .1

# ---- what a plan is

def test_parts_add_up_and_are_what_they_say():
    p = plan('llama-7b', LoRA(), batch=1, seq=128)
    assert p.total == sum(p.parts.values()) and abs(p.total - max(p.phases.values())) <= len(p.parts)
    assert p.parts['tuner'] == 4*p.trained and abs(p.parts['moments'] - 8*p.trained) < 4*1000 # and a number of steps each
    assert 2*p.numbers <= p.parts['weights'] < 2*p.numbers*1.001
    q = plan('llama-7b', 'qlora', batch=1, seq=128)
    linear = p.numbers - 2*32000*4096 - 65*4096
    assert abs(8*q.parts['scales']/linear - .127) < .001 # double quantization's bits per weight, arXiv:2305.14314
    f = plan('smollm2-135m', 'full', 1, 64, dtype=torch.float32)
    assert f.parts['gradients'] == 4*f.numbers and 'tuner' not in f.parts

def test_a_gpu_holds_no_scores_where_the_cpu_must():
    "Keys of 192 numbers and values of 128: torch's kernel for the CPU wants them alike."
    t = LoRA(targets='o_proj')
    cpu, gpu = (plan(small('deepseek'), t, 1, 384, device=d) for d in ('cpu', 'cuda'))
    assert cpu.parts['activations'] - gpu.parts['activations'] > 4*384*384*2 # of the two layers through which gradients pass, one at least still holds the scores of its four heads at the peak, in bf16

def test_devices_share_all_but_activations():
    one, two, many = (plan('llama-3.1-8b', 'lora', 1, 256, devices=n) for n in (1, 2, 1000))
    for k in ('weights', 'tuner', 'moments'): assert abs(two.parts[k]/one.parts[k] - .5) < 1e-6
    for k in ('activations', 'logits'): assert two.each['backward'][k] == one.each['backward'][k]
    low_rank = 4*4*(4096 + 4096 + 4096 + 1024) # bytes of A and B beside queries and values
    rest, block = 2*(2*128256*4096 + 4096), 2*(2*4096*4096 + 2*4096*1024 + 3*4096*14336 + 2*4096) + low_rank
    assert 'gathered' not in one.parts
    assert {two.parts['gathered'], many.parts['gathered']} <= {2*rest + 2*block, rest + 4*block + low_rank}
    assert many.total < two.total < one.total

def test_cards_are_those_that_take_it():
    p = plan('llama-3.1-8b', 'lora', 1, 256)
    assert [n for n, gb in gpus.items() if gb*1e9 >= p.total] == p.cards and 'T4' not in p.cards and 'H100' in p.cards
    assert plan('gpt-3-175b', 'lora', 1, 64).cards == []

def test_what_is_shown():
    p = plan('gpt2', 'lora', 1, 32)
    md = p._repr_markdown_()
    assert all(k in md and k in repr(p) for k in p.parts) and f'{p.trained:,}' in md and 'fits on: T4' in md
    import matplotlib
    matplotlib.use('Agg')
    ax = bars({'a': p, 'b': plan('gpt2', 'qlora', 1, 32)})
    assert abs(sum(r.get_width() for r in ax.patches if r.get_y() < .5) - p.total/1e9) < 1e-6

def test_no_memory_is_taken_and_nothing_is_left_changed():
    torch.manual_seed(0)
    state, attend, generator = torch.get_rng_state(), F.scaled_dot_product_attention, torch.Generator
    assert peak_bytes(lambda: plan('llama-3.1-70b', 'lora', 1, 64)) < 50e6 # 141 GB of weights; the tape itself takes some
    assert torch.equal(state, torch.get_rng_state()) and F.scaled_dot_product_attention is attend and torch.Generator is generator
    t = LoRA(r=2)
    plan('gpt2', t, 1, 32)
    assert t.model is None and not hasattr(t, '_edits')

@pytest.mark.parametrize('make, says', (
    (lambda: plan('llama-9b'), 'llama-9b.*llama-7b.*config.json'), (lambda: plan(7), 'model=int'), (lambda: plan('gpt2', 'magic'), "'magic'.*prompt_tuning"),
    (lambda: plan('gpt2', device='tpu'), "device='tpu'.*'cuda' and 'cpu'"), (lambda: plan('gpt2', seq=4096), 'seq=4096.*1024 positions'),
    (lambda: plan('gpt2', batch=0), 'batch=0'), (lambda: plan('gpt2', devices=0), 'devices=0'), (lambda: plan('gpt2', supervised=512), 'supervised=512'),
    (lambda: plan('gpt2', 'qlora', bits=3), r'QLoRA\(bits=3\)'), (lambda: plan('gpt2', 'full', bits=4), 'cannot train'), (lambda: plan('gpt2', bits=9), 'bits=9'),
    (lambda: plan('gpt2', 'prefix_tuning', checkpointing=True), 'peft#869'), (lambda: plan('gpt2', LoRA(r=5000)), 'r=5000')))
def test_errors_are_one_line_with_the_way_out(make, says):
    with pytest.raises(ValueError, match=says) as e: make()
    assert '\n' not in str(e.value)

# ---- the command

def sh(capsys, *words):
    from peftbook.cli import main
    code = main(list(words))
    return code, *capsys.readouterr()

def test_the_command_says_what_the_function_does(capsys):
    code, out, err = sh(capsys, 'plan', 'lora', '--model', 'llama-7b', '--r', '16', '--seq', '128', '--batch', '2', '--checkpointing', '--devices', '2')
    p = plan('llama-7b', LoRA(r=16), 2, 128, checkpointing=True, devices=2)
    assert code == 0 and f'{p.total/1e9:.2f} GB' in out and f'{p.parts["gathered"]/1e9:.2f}' in out and 'RTX 4090' in out

def test_the_command_refuses_in_one_line(capsys):
    code, out, err = sh(capsys, 'plan', 'lora', '--model', 'llama-9b')
    assert code == 2 and len(err.strip().splitlines()) == 1 and 'llama-7b' in err

def test_the_first_plan_of_a_process_is_like_the_next():
    "Tables that quantization keeps for good are made before the tape runs."
    code = "from peftbook.planner import plan; print(*(plan('tiny:llama', 'qlora', seq=32).total for _ in range(2)))"
    first, second = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.split()
    assert first == second

def test_each_phase_has_parts_of_its_own():
    p = plan('tiny:llama', 'full', 2, 64, dtype=torch.float32)
    assert set(p.each) == {'step', 'forward', 'backward'} and p.phases == {k: sum(v.values()) for k, v in p.each.items()}
    top = max(p.phases, key=p.phases.get)
    assert p.parts == p.each[top] and p.total == p.phases[top]
    assert 'optimizer' in p.each['step'] and 'optimizer' not in p.each['forward']
