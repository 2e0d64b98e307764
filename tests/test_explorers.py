"The explorers as widgets: events are fired, the outputs read."
import base64, re

import pytest, torch

from peftbook.core import fingerprint
from peftbook.explorers import Explorer, _config, _few, _quick_plan, explore_bits, explore_memory, explore_rank, playground
from peftbook.lora import LoRA
from peftbook.models import generate, tiny_model
from peftbook.planner import gpus, plan
from peftbook.quantization import quantize_tensor

def png(e):
    "The picture that an explorer shows, as bytes; its alternative text."
    m = re.search(r'src="data:image/png;base64,([^"]+)" width="\d+" height="\d+".* alt="([^"]*)"', e.out.value)
    return base64.b64decode(m[1]), m[2]

def test_rank_follows_the_slider():
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    e = explore_rank(W)
    seen = set()
    for r in (1, 5, 24):
        e.controls['r'].value = r
        best = torch.linalg.svdvals(W)[r:].square().sum().sqrt()/W.norm() # Eckart and Young: what is left out
        assert f'rank {r} of 24 x 40: relative error {best.item():.3f}, {64*r:,} numbers instead of 960' in e.words
        picture, alt = png(e)
        assert picture.startswith(b'\x89PNG') and alt == e.words
        seen.add(picture)
    assert len(seen) == 3

def test_bits_follow_every_control():
    w = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    e = explore_bits(w)
    for change in (dict(bits=2), dict(block_size=16), dict(codebook='int'), dict(codebook='affine', bits=8)):
        for k, v in change.items(): e.controls[k].value = v
        v = e.values()
        q = quantize_tensor(w, v['bits'], v['codebook'], v['block_size'])
        assert f'relative error {((q.dequantize() - w).norm()/w.norm()).item():.4f}, {8*q.nbytes/4096:.2f} bits a weight' in e.words

def test_bits_leave_the_model_alone():
    model, tok = tiny_model('gpt2')
    was = {n: p.clone() for n, p in model.named_parameters()}
    e = explore_bits(torch.randn(64), model, tok, 'why')
    assert 'It says: ' in e.words
    assert all(torch.equal(p, was[n]) for n, p in model.named_parameters())

def test_memory_follows_every_control():
    e, seen = explore_memory(), set()
    for change in (dict(model='smollm2-135m'), dict(method='adapters'), dict(batch=4), dict(seq=128), dict(bits=4), dict(checkpointing=True)):
        for k, v in change.items(): e.controls[k].value = v
        v = e.values()
        p = plan(v.pop('model'), v.pop('method'), **v) # of all layers
        assert f'{p!r}; {p.trained:,} of {p.numbers:,} numbers train; fits on {", ".join(p.cards)}' == e.words
        picture, alt = png(e)
        assert picture.startswith(b'\x89PNG') and alt == e.words
        seen.add(picture)
    assert len(seen) == 6

def test_memory_says_what_fits_nowhere_and_what_cannot_be():
    e = explore_memory()
    e.controls['model'].value = 'llama-3.1-405b'
    assert e.words.endswith('fits on none of ' + ', '.join(gpus)) and png(e)
    e.controls['method'].value = 'full'
    e.controls['bits'].value = 4
    assert 'cannot train' in e.words and e.out.value.startswith('<p>')
    e.controls['bits'].value = None
    assert 'fits on none of' in e.words

def test_few_layers_say_what_all_take_where_the_peak_moves_to_another_phase():
    how, config = dict(batch=8, seq=64), _config('smollm2-135m')[1] # two layers need most in the backward pass (the embedding's gradient), thirty in the forward (what it keeps)
    config.num_hidden_layers = _few
    peak = lambda p: max(p.phases, key=p.phases.get)
    assert (peak(plan(config, 'full', **how)), peak(_quick_plan('smollm2-135m', 'full', **how))) == ('backward', 'forward')
    for method in ('full', 'prefix_tuning', 'soft_prompting'): assert _quick_plan('smollm2-135m', method, **how).parts == plan('smollm2-135m', method, **how).parts

def test_playground_answers_with_the_adapter_chosen(tmp_path):
    model, tok = tiny_model('llama')
    base = fingerprint(model)
    t = LoRA(r=8).attach(model)
    for p in t.params.values(): torch.nn.init.normal_(p, std=.5)
    t.save(tmp_path/'a')
    want = generate(model, tok, ['hello'], 8)[0]
    t.detach()
    plain = generate(model, tok, ['hello'], 8)[0]
    assert want != plain
    e = playground(model, tok, {'mine': tmp_path/'a'}, 8)
    e.controls['request'].value = 'hello'
    assert e.words == f"base: {' '.join(plain.split())} / mine: {' '.join(want.split())}"
    assert not hasattr(model, 'tuner') and fingerprint(model) == base

def test_what_goes_wrong_is_said_in_the_place_of_the_picture(tmp_path):
    model, tok = tiny_model('llama')
    other = LoRA().attach(tiny_model('llama', seed=1)[0])
    other.save(tmp_path/'a')
    e = playground(model, tok, {'other': tmp_path/'a'}, 8)
    assert 'another base' in e.words and e.out.value.startswith('<p>')
    with pytest.raises(ValueError, match='adapters is empty'): playground(model, tok, {})

def test_a_page_that_runs_nothing_shows_picture_and_values():
    e = explore_rank(torch.randn(8, 8))
    b = e._repr_mimebundle_()
    assert b['application/vnd.jupyter.widget-view+json']['model_id'] == e.box.model_id
    assert b['text/html'].startswith(e.out.value) and 'r 8.' in b['text/html'] and b['text/plain'] == repr(e)

def test_words_are_no_markup():
    e = Explorer(lambda: (None, '<script>'))
    assert e.out.value == '<p>&lt;script&gt;</p>'
