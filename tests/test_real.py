"One real training on the real model per method: few steps, for the gate; the chapters show the whole ones."
import pytest, torch

from peftbook.adapters import Adapters
from peftbook.core import Tuner
from peftbook.full import Full
from peftbook.lora import LoRA
from peftbook.models import generate, load_model
from peftbook.prefix_tuning import PrefixTuning
from peftbook.prompt_tuning import PromptTuning
from peftbook.qlora import QLoRA
from peftbook.quantization import load_quantized
from peftbook.scenarios import scenarios
from peftbook.soft_prompting import SoftPrompting
from peftbook.training import evaluate, fit

@pytest.fixture(scope='module')
def real(): return load_model()

@pytest.fixture(scope='module')
def few_bits(): return load_quantized()

trials = {Full: 16, PromptTuning: 32, PrefixTuning: 16, Adapters: 16, LoRA: 16, QLoRA: 16} # steps: vectors in front learn more slowly

@pytest.mark.parametrize('method,steps', trials.items(), ids=lambda o: getattr(o, '__name__', ''))
def test_learns_the_airline_task(request, method, steps, tmp_path):
    tuner, (model, tok) = method(), request.getfixturevalue('few_bits' if method is QLoRA else 'real')
    task = scenarios['airline']()
    task.score = None # the loss tells in a few steps what the score tells in many
    torch.manual_seed(0)
    before = evaluate(model, tok, task, n=16)['loss']
    tuner.attach(model)
    fit(tuner, tok, task, steps=steps, batch_size=4)
    tuner.save(tmp_path/'a')
    after = evaluate(model, tok, task, n=16)['loss']
    assert after < before/2
    reply = generate(model, tok, [task.test[0]['prompt']])
    tuner.detach()
    assert evaluate(model, tok, task, n=16)['loss'] == before
    back = Tuner.load(tmp_path/'a', model)
    assert generate(model, tok, [task.test[0]['prompt']]) == reply
    back.detach()

def test_words_reuse_the_computed_prefix(tmp_path):
    "Soft prompting on the real model: same replies with the prefix computed once as with the words sent each time, and after loading."
    model, tok = load_model(dtype=torch.float32) # in bf16 the two ways round differently, and a close choice of a word may turn
    task = scenarios['airline']()
    asked = [r['prompt'] for r in task.test[:3]]
    t = SoftPrompting().for_task(task).attach(model)
    replies = generate(model, tok, asked, max_new_tokens=16)
    assert t._edits[0].kept is not None
    t.save(tmp_path/'a')
    t._edits[0].undo(model)
    assert generate(model, tok, asked, max_new_tokens=16) == replies
    t._edits[0].apply(model)
    t.detach()
    back = Tuner.load(tmp_path/'a', model)
    assert generate(model, tok, asked, max_new_tokens=16) == replies
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
