"One real training on the real model per method: few steps, for the gate; the chapters show the whole ones."
import pytest

from peftbook.core import Tuner
from peftbook.lora import LoRA
from peftbook.models import generate, load_model
from peftbook.scenarios import scenarios
from peftbook.training import evaluate, fit

@pytest.fixture(scope='module')
def real(): return load_model()

@pytest.mark.parametrize('tuner', [LoRA()], ids=lambda t: t.name)
def test_learns_the_airline_task(real, tuner, tmp_path):
    import torch
    model, tok = real
    task = scenarios['airline']()
    task.score = None # the loss tells in a few steps what the score tells in many
    torch.manual_seed(0)
    before = evaluate(model, tok, task, n=32)['loss']
    tuner.attach(model)
    fit(tuner, tok, task, steps=20, batch_size=4, out=tmp_path/'a')
    after = evaluate(model, tok, task, n=32)['loss']
    assert after < before/2
    reply = generate(model, tok, [task.test[0]['prompt']])
    tuner.detach()
    assert evaluate(model, tok, task, n=32)['loss'] == before
    back = Tuner.load(tmp_path/'a', model)
    assert generate(model, tok, [task.test[0]['prompt']]) == reply
    back.detach()

def test_adapter_of_smollm2_is_its_numbers(real, tmp_path):
    "230,400 numbers for q,v at r = 4: 4 bytes each and less than 16 kB."
    model, _ = real
    t = LoRA().attach(model)
    t.save(tmp_path/'a')
    t.detach()
    assert t.cost()['trained'] == 230_400
    size = sum(f.stat().st_size for f in (tmp_path/'a').iterdir())
    assert 4*230_400 < size < 4*230_400 + 16_000
