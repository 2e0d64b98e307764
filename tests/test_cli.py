"The command as a user meets it: in a shell, with wrong words, stopped in the middle."
import json, os, signal, subprocess, sys
from pathlib import Path

import pytest, torch

from peftbook.cli import main
from peftbook.models import tiny_model

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny model, a file of rows, and a place for adapters."
    d = tmp_path_factory.mktemp('cli')
    model, tok = tiny_model('llama')
    model.save_pretrained(d/'tiny'); tok.save_pretrained(d/'tiny')
    other, _ = tiny_model('llama', seed=1)
    other.save_pretrained(d/'other'); tok.save_pretrained(d/'other')
    (d/'rows.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'say {i}', completion=f'it is {i}')) for i in range(60)))
    return d

def start(folder, *words):
    env = os.environ | dict(OMP_NUM_THREADS='1')
    return subprocess.Popen([Path(sys.executable).parent/'peftbook', *words], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def run(folder, *words):
    p = start(folder, *words)
    out, err = p.communicate(timeout=120)
    return p.returncode, out, err

tune = 'tune lora --data rows.jsonl --model tiny'.split()

def adapter(folder, name): return (folder/name/'adapter_model.safetensors').read_bytes()

@pytest.fixture(scope='module')
def tuned(folder):
    code, out, err = run(folder, *tune, '--steps', '300', '--out', 'whole')
    assert code == 0, err
    return out

def test_tune_shows_before_and_after(folder, tuned):
    assert tuned.index('before') < tuned.index('after') and "peftbook generate --adapter whole 'say " in tuned # with a request of its own rows
    assert sorted(f.name for f in (folder/'whole').iterdir()) == ['adapter_model.safetensors', 'history.json', 'scores.json', 'tuner.json']

def test_generate_shows_both(folder, tuned):
    code, out, err = run(folder, 'generate', '--adapter', 'whole', 'say 3', 'say 4')
    assert code == 0 and out.count('base:') == 2 and out.count('tuned:') == 2, err

def test_ctrl_c_and_resume(folder, tuned):
    "Ctrl-C in the middle: code 130, a word on how to go on, and the resumed run ends where the undisturbed one does, byte for byte."
    p = start(folder, *tune, '--steps', '300', '--out', 'halted')
    for line in p.stderr:
        if line.startswith('step') and int(line.split()[1].split('/')[0]) >= 30: break
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and 'Traceback' not in err and 'with --resume to go on from halted' in err
    assert (folder/'halted'/'checkpoint.safetensors').exists() and not (folder/'halted'/'tuner.json').exists()
    code, out, err = run(folder, *tune, '--steps', '300', '--out', 'halted', '--resume')
    assert code == 0, err
    assert adapter(folder, 'halted') == adapter(folder, 'whole')

@pytest.fixture
def refused(folder, monkeypatch, capsys):
    "A function that runs words which must be refused, and returns the one line."
    monkeypatch.chdir(folder)
    def f(*words):
        assert main(list(words)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    return f

def test_refusal_in_a_shell(folder):
    code, out, err = run(folder, 'tune', 'lora', '--data', 'nonesuch.jsonl')
    assert code == 2 and 'Traceback' not in err and len(err.strip().splitlines()) == 1

def write(folder, name, text):
    (folder/name).write_text(text)
    return name

@pytest.mark.parametrize('text,said', [('{"prompt": "a", "completion": "b"}\n{"prompt": "a"', 'bad.jsonl:2'), ('{"prompt": "a"}', "no 'completion'"),
    ('{"prompt": "a", "completion": ""}', 'empty completion'), ('', 'no rows'), ('{"prompt": "a", "completion": "b"}', 'too few'), ('[1]', 'must be an object')])
def test_bad_rows(folder, refused, text, said):
    line = refused('tune', 'lora', '--data', write(folder, 'bad.jsonl', text), '--model', 'tiny', '--out', 'never')
    assert said in line and not (folder/'never').exists()

@pytest.mark.parametrize('words,said', [('--targets nonesuch', 'q_proj'), ('--r 0', 'r=0'), ('--r 33', 'at most rank'), ('--r two', 'invalid'), ('--steps 0', 'no whole number'),
    ('--lr -1', 'no number above 0'), ('--init magic', 'pissa'), ('--bogus 1', '--bogus'), ('--dropout 1', 'share'), ('--task airline', 'not allowed')])
def test_bad_options(folder, refused, words, said):
    line = refused(*tune, '--out', 'never', *words.split())
    assert said in line and not (folder/'never').exists()

@pytest.mark.parametrize('too_much, said', [
    (lambda: torch.empty(2**60), "can't allocate memory"),
    (lambda: raise_(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has little left.')), 'Tried to allocate 2.00 GiB: tune with --batch-size 1')])
def test_out_of_memory_says_what_to_do(folder, refused, monkeypatch, too_much, said):
    monkeypatch.setattr('peftbook.cli._answers', lambda *args: too_much())
    assert said in (line := refused(*tune, '--out', 'none')) and 'peftbook plan' in line

def raise_(e): raise e

def test_missing_file(folder, refused): assert 'nonesuch.jsonl' in refused('tune', 'lora', '--data', 'nonesuch.jsonl')
def test_unknown_task(folder, refused): assert 'airline' in refused('tune', 'lora', '--task', 'airlines')
def test_folder_of_another_run(folder, refused, tuned): assert 'whole holds another run (history.json): pass --resume' in refused(*tune, '--out', 'whole')
def test_other_settings(folder, refused, tuned): assert 'steps=300' in refused(*tune, '--steps', '7', '--out', 'whole', '--resume')
def test_other_base(folder, refused, tuned): assert 'another base' in refused('generate', '--adapter', 'whole', '--model', 'other', 'hi')
def test_no_adapter(folder, refused): assert 'holds no adapter' in refused('generate', '--adapter', 'tiny', 'hi')
def test_out_is_a_file(folder, refused): assert 'is a file' in refused(*tune, '--out', 'rows.jsonl')

def test_no_network(folder, refused):
    line = refused('tune', 'lora', '--data', 'rows.jsonl', '--model', 'nobody/nothing-here', '--out', 'never')
    assert 'nobody/nothing-here' in line and not (folder/'never').exists()

def test_truncated_adapter(folder, refused, tuned):
    import shutil
    shutil.copytree(folder/'whole', folder/'cut')
    (folder/'cut'/'adapter_model.safetensors').write_bytes(adapter(folder, 'whole')[:-9])
    assert 'truncated' in refused('generate', '--adapter', 'cut', 'hi')
