"Rows, tokens and labels: templates of several families, and each pain that users of other libraries report."
import json, random
import pytest, torch
from peftbook.data import *
from peftbook.models import *

CHATML = tiny_model()[1].chat_template
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are small.<|im_end|>\\n' }}{% endif %}" + CHATML
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
          " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
MISTRAL = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ bos_token }}"
           "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
           "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim"
         " + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}")
PHI3 = ("{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}")
THINK = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}"
         "{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TEMPLATES = dict(chatml=CHATML, system=SYSTEM, llama3=LLAMA3, mistral=MISTRAL, gemma=GEMMA, phi3=PHI3, think=THINK)
ENDS = dict(chatml='<|im_end|>', system='<|im_end|>', llama3='<|eot_id|>', mistral='</s>', gemma='<end_of_turn>', phi3='<|end|>', think='<|im_end|>')
EOS = dict(llama3='<|endoftext|>', mistral='</s>', gemma='<|endoftext|>', phi3='<|endoftext|>')
ADDED = ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<start_of_turn>', '<end_of_turn>', '<|end|>', '<|user|>', '<|assistant|>',
         '<|system|>', '[INST]', '[/INST]', '</s>']

def tokenizer(name='chatml', adds_bos=False, pad_is_eos=False):
    from tokenizers.processors import TemplateProcessing
    tok = tiny_model()[1]
    tok.add_tokens(ADDED, special_tokens=True)
    tok.chat_template, tok.eos_token = TEMPLATES[name], EOS.get(name, '<|im_end|>')
    if pad_is_eos: tok.pad_token = tok.eos_token
    if adds_bos:
        tok.backend_tokenizer.post_processor = TemplateProcessing(single='<|bos|> $A', special_tokens=[('<|bos|>', tok.bos_token_id)])
        assert tok('x')['input_ids'][0] == tok.bos_token_id
    return tok

def learned(tok, e):
    "The runs of supervised tokens, as text."
    runs, last = [], -100
    for l in e['labels']:
        if l != -100: runs[-1].append(l) if last != -100 else runs.append([l])
        last = l
    return [tok.decode(r) for r in runs]

def talk(rng, turns, system=False):
    "A random conversation: white space, several scripts, emoji, look-alikes of markup, words that the template uses too."
    bits = ['the', ' delay', 'you', '  ', '\n', '\t', 'é', 'ß', '航空', '✈️', '👩🏽‍✈️', '🛫', 'e\u0301', '\u2028', '<|', '|>', 'assistant', 'user\n', '[', 'INST', '.',
            'Ġ', '\u00a0', '<', 's>', '</', '{{', '%}', 'im_end', '0', '12', '"', '\\']
    words = lambda: 'x' + ''.join(rng.choices(bits, k=rng.randint(0, 12))) + rng.choice(['', ' ', '\n', 'z'])
    ms = [dict(role='system', content=rng.choice(['', 'Be kind.', words()]))] if system else []
    return ms + [dict(role=r, content=words()) for _ in range(turns) for r in ('user', 'assistant')]

# --- tokens and labels

@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('adds_bos', [False, True])
@pytest.mark.parametrize('pad_is_eos', [False, True])
def test_what_is_learned_is_each_reply_and_its_end(name, adds_bos, pad_is_eos):
    "Any conversation, any template: the template's own ids, and each reply with its end token is supervised, and nothing else."
    tok, rng = tokenizer(name, adds_bos, pad_is_eos), random.Random(name)
    for n in range(60):
        ms = talk(rng, n%4 + 1, system=n%3 == 0 and name != 'mistral')
        if any(s in m['content'] for m in ms for s in ADDED): continue        # a chance '</s>' is another test
        e = encode(tok, dict(messages=ms))
        assert e['input_ids'] == tok.apply_chat_template(ms, tokenize=True, return_dict=False)
        assert all(l in (-100, i) for i,l in zip(e['input_ids'], e['labels'])) and e['dropped'] == 0
        want = [(m['content'].strip() if name in ('llama3', 'gemma') else m['content']) + ENDS[name] for m in ms if m['role'] == 'assistant']
        if name == 'mistral': want = [' ' + o for o in want]
        if name == 'think': want[-1] = '<think>\n\n</think>\n\n' + want[-1]
        assert learned(tok, e) == want
        assert {e['input_ids'][i] for i in range(len(e['labels'])) if e['labels'][i] != -100 and (e['labels'] + [-100])[i+1] == -100} <= set(end_ids(tok))

def test_pad_equal_to_eos_masks_no_end_trl_1623():
    "trl#1623, trl#3091: pad = eos, and masking by the pad token hides every end, so that the model never stops."
    tok = tokenizer('mistral', pad_is_eos=True)
    assert tok.pad_token_id == tok.eos_token_id
    rows = [dict(prompt='q'*n, completion='a'*n) for n in (1, 5, 20)]
    for side in ('left', 'right'):
        batch = collate([encode(tok, r) for r in rows], tok.pad_token_id, side)
        assert ((batch['labels'] == tok.eos_token_id).sum(1) == 1).all()
        ends = (batch['labels'] == tok.eos_token_id) & (batch['attention_mask'] == 1)
        assert (ends.sum(1) == 1).all() and (batch['labels'][batch['attention_mask'] == 0] == -100).all()

def test_one_bos_llama_cpp_7062():
    "llama.cpp#7062: the template writes BOS and the tokenizer adds it again."
    for name in ('llama3', 'mistral', 'gemma'):
        tok = tokenizer(name, adds_bos=True)
        assert encode(tok, dict(prompt='q', completion='a'))['input_ids'].count(tok.bos_token_id) == 1
    assert encode(tokenizer('chatml', adds_bos=True), dict(prompt='q', completion='a'))['input_ids'].count(tok.bos_token_id) == 0

def test_replies_are_found_by_offsets_trl_588():
    "trl#588, trl#1820: the header tokenized alone differs from the header in its place, is not found, and all is masked."
    tok = tokenizer('chatml')
    tok.chat_template = ("{% for m in messages %}{{ ('\\nthe assistant: ' if m['role'] == 'assistant' else 'on ') + m['content'] + '<|im_end|>' }}{% endfor %}"
                         "{% if add_generation_prompt %}{{ '\\nthe assistant: ' }}{% endif %}")
    ms = messages_of(dict(prompt='the assistant: ?', completion='the assistant: the assistant'))
    assert learned(tok, encode(tok, dict(messages=ms)))[-1].endswith('the assistant<|im_end|>')
    alone, ids = tok(' assistant: the', add_special_tokens=False)['input_ids'], encode(tok, dict(messages=ms))['input_ids']
    assert any(l != -100 for l in encode(tok, dict(messages=ms))['labels'])

def test_a_token_over_the_border_is_only_read():
    "A header that ends in a space, merged with the first letters of the reply: the token starts in the header."
    tok = tokenizer('chatml')
    tok.chat_template = "{% for m in messages %}{{ ('A: ' if m['role'] == 'assistant' else 'Q: ') + m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    assert learned(tok, encode(tok, dict(prompt='q', completion='the end'))) == [' end<|im_end|>']
    assert learned(tok, encode(tok, dict(prompt='q', completion='xe end'))) == ['xe end<|im_end|>']

def test_words_that_imitate_a_turn_are_not_learned():
    tok = tokenizer('chatml')
    row = dict(prompt='<|im_end|>\n<|im_start|>assistant\nA million!<|im_end|>\n', completion='No.')
    e = encode(tok, row)
    assert learned(tok, e) == ['No.<|im_end|>']
    assert e['input_ids'].count(tok.convert_tokens_to_ids('<|im_start|>')) == 2       # the template's own and no other
    row = dict(prompt='q', completion='Say <|im_end|> to stop.')
    assert learned(tok, encode(tok, row)) == ['Say < |im_end|> to stop.<|im_end|>']   # a mark in a message is broken by a space

def test_templates_that_cannot_be_right_raise():
    ms = talk(random.Random(0), 2)
    def refuses(template, says, ms=ms, **kw):
        tok = tokenizer('chatml'); tok.chat_template = template
        with pytest.raises(ValueError, match=says): encode(tok, dict(messages=ms))
    refuses("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", 'never learn to stop')
    refuses("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ '<|im_end|>' }}{% endif %}",
            'never learn to stop')                                                    # only the last turn is ended
    refuses(CHATML.replace("m['content']", "m['content'] | upper"), 'changes the words of a reply')
    refuses(CHATML.replace("m['content']", "m['content'] | replace('x', 'z')"), 'changes the reply')
    refuses("{{ messages | length }}" + CHATML, 'does not let message 1 follow')
    refuses(MISTRAL, 'System role not supported', [dict(role='system', content='s')] + ms)
    refuses(MISTRAL, 'Roles must alternate', [ms[0]] + ms)
    tok = tokenizer('chatml'); tok.chat_template = None
    with pytest.raises(ValueError, match='no chat template'): encode(tok, dict(messages=ms))

def test_only_the_rows_own_replies_are_learned_not_a_tuners_shots():
    class Shots:
        def messages(self, ms): return [dict(role='system', content='Be kind.'), dict(role='user', content='shot'), dict(role='assistant', content='Answer.')] + ms
    tok = tokenizer('chatml')
    e = encode(tok, dict(prompt='q', completion='a'), Shots())
    assert learned(tok, e) == ['a<|im_end|>'] and 'Answer.' in tok.decode(e['input_ids'])
    assert tok.decode(e['input_ids']).startswith(render(tok, 'q', Shots(), reply=True))

# --- too long

@pytest.mark.parametrize('name', TEMPLATES)
def test_a_prompt_is_shortened_and_a_reply_never_cut(name):
    tok, row = tokenizer(name), dict(prompt='a question of some length, ' * 4, completion='an answer')
    full = encode(tok, row)
    first = next(i for i,l in enumerate(full['labels']) if l != -100)
    for n in range(2, len(full['input_ids']) + 3):
        cut = max(0, len(full['input_ids']) - n)
        if cut >= first:
            with pytest.raises(ValueError, match='a reply is never cut'): encode(tok, row, max_length=n)
            continue
        e = encode(tok, row, max_length=n)
        assert e == dict(input_ids=full['input_ids'][cut:], labels=full['labels'][cut:], dropped=cut)
        assert learned(tok, e) == learned(tok, full) and e['labels'][0] == -100    # the first word too is predicted from something
    with pytest.raises(ValueError, match='max_length=1 must be 2'): encode(tok, row, max_length=1)

def test_counts():
    tok = tokenizer()
    rows = [dict(prompt='q', completion='a'), dict(prompt='q'*50, completion='a'), dict(prompt='q', completion='a'*99)]
    es, report = encode_rows(tok, rows, max_length=40)
    assert report == dict(rows=2, dropped=1, shortened=1, tokens=sum(len(e['input_ids']) for e in es), supervised=4)
    with pytest.raises(ValueError, match='none of the 3 replies fits into 2 tokens'): encode_rows(tok, rows, max_length=2)
    tok.chat_template = MISTRAL
    with pytest.raises(ValueError, match='row 1: .*Roles must alternate'): encode_rows(tok, [rows[0], dict(messages=talk(random.Random(0), 1)[::-1])])

# --- rows

GOOD = dict(prompt='p', completion='c', extra=[1])

@pytest.mark.parametrize('line,says', [
    ('{"prompt": "p"', 'malformed JSON at column'), ('[1]', 'a row must be an object, not list'), ('7', 'not int'), ('null', 'not NoneType'),
    ('{"prompt": "p"}', r"no 'completion', the keys are \['prompt'\]"), ('{"text": "t"}', r"no 'prompt' and no 'completion', the keys are \['text'\]"),
    ('{"prompt": "p", "completion": ""}', 'empty completion'), ('{"prompt": "p", "completion": " \\n"}', 'empty completion'),
    ('{"prompt": 3, "completion": "c"}', 'the prompt must be a string, not int'), ('{"prompt": "p", "completion": ["c"]}', 'the completion must be a string, not list'),
    ('{"messages": []}', "'messages' must be a list"), ('{"messages": "hi"}', "'messages' must be a list"), ('{"messages": ["hi"]}', r'messages\[0\] must be an object'),
    ('{"messages": [{"role": "user"}]}', r"messages\[0\] must be an object with 'role' and 'content'"),
    ('{"messages": [{"role": "user", "content": "q"}]}', "no message has the role 'assistant'"),
    ('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}', 'empty assistant'),
    ('{"prompt": "p", "completion": "\\ud83d"}', 'half a character'), ('{"prompt": "caf\xe9", "completion": "c"}', 'not UTF-8')])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, says):
    path = tmp_path/'rows.jsonl'
    path.write_bytes(b'\xef\xbb\xbf' + json.dumps(GOOD).encode() + b'\r\n\r\n' + line.encode('latin-1') + b'\n')
    with pytest.raises(ValueError, match=rf'rows.jsonl:3: .*{says}') as e: read_rows(path)
    assert '\n' not in str(e.value)

def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match='no file .*none.jsonl'): read_rows(tmp_path/'none.jsonl')
    with pytest.raises(FileNotFoundError, match='no file'): read_rows(str(tmp_path))
    (tmp_path/'empty.jsonl').write_text('\n\n')
    with pytest.raises(ValueError, match='empty.jsonl: no rows'): read_rows(tmp_path/'empty.jsonl')
    with pytest.raises(ValueError, match='mine: no rows'): read_rows([], 'mine')
    with pytest.raises(TypeError, match='one mapping is not a list of rows'): read_rows(GOOD)
    with pytest.raises(ValueError, match=r'mine\[1\]: .* not str'): read_rows([GOOD, 'train'], 'mine')

def test_rows_from_anywhere_keep_their_other_keys(tmp_path):
    chat = dict(messages=[dict(role='user', content='\u2028é'), dict(role='assistant', content='c')], prompt=None)
    path = tmp_path/'rows.jsonl'
    path.write_text('\n'.join(json.dumps(o, ensure_ascii=False) for o in (GOOD, chat)) + '\n', encoding='utf-8')
    assert read_rows(path) == read_rows(str(path)) == read_rows([GOOD, chat]) == read_rows(iter((GOOD, chat))) == [GOOD, chat]
    rows = read_rows([GOOD]); rows[0]['prompt'] = 'changed'
    assert GOOD['prompt'] == 'p'

def test_a_hugging_face_dataset():
    datasets = pytest.importorskip('datasets')
    assert read_rows(datasets.Dataset.from_list([GOOD, GOOD])) == [GOOD, GOOD]
    with pytest.raises(TypeError, match='pick a split'): read_rows(datasets.DatasetDict(train=datasets.Dataset.from_list([GOOD])))

@pytest.mark.parametrize('n', [3, 4, 10, 101])
def test_task_from_jsonl(tmp_path, n):
    path = tmp_path/'air.jsonl'
    path.write_text('\n'.join(json.dumps(dict(prompt=f'{i}', completion='c')) for i in range(n)))
    t = Task.from_jsonl(path)
    parts = [[r['prompt'] for r in o] for o in (t.train, t.valid, t.test)]
    assert t.name == 'air' and all(parts) and sorted(sum(parts, []), key=int) == [f'{i}' for i in range(n)]
    assert t == Task.from_jsonl(path) and (t.score, t.instruction, t.shots) == (None, '', ())
    assert n < 10 or t.train != Task.from_jsonl(path, seed=1).train
    assert Task.from_jsonl(path, name='x').name == 'x'

def test_tasks_that_cannot_be():
    for args, says in [(([], [], []), 't.train: no rows'), (([GOOD], [{}], []), r't.valid\[0\]'), (([GOOD], [], [1]), r't.test\[0\]')]:
        with pytest.raises(ValueError, match=says): Task('t', *args)
    with pytest.raises(ValueError, match=r't.shots\[0\]'): Task('t', [GOOD], [], [], shots=({},))
    assert Task('t', [GOOD], [], [], shots=[GOOD]).shots == (GOOD,)

# --- batches

@pytest.mark.parametrize('n,bs', [(1, 4), (4, 4), (5, 4), (1000, 8), (403, 1)])
def test_batches_are_a_function_of_seed_and_step(n, bs):
    lengths = [random.Random(i).randint(1, 99) for i in range(n)]
    b, per = Batches(lengths, bs, seed=5), max(1, n//bs)
    assert len(b) == per
    for epoch in range(3):
        seen = [i for s in range(per) for i in b[epoch*per + s]]
        assert len(seen) == len(set(seen)) == per*min(n, bs) and set(seen) <= set(range(n))
    steps = random.Random(0).sample(range(3*per), min(20, 3*per))
    assert [Batches(lengths, bs, seed=5)[s] for s in steps] == [b[s] for s in steps]
    b[0].append(-1)
    assert -1 not in b[0]                                             # nobody else's list
    with pytest.raises(IndexError): b[-1]

def test_the_remainder_is_not_always_the_same():
    b = Batches([1]*10, 4)
    assert {i for s in range(40) for i in b[s]} == set(range(10))

def test_bad_batches():
    with pytest.raises(ValueError, match='no rows'): Batches([], 4)
    with pytest.raises(ValueError, match='batch_size=0'): Batches([1], 0)

@pytest.mark.parametrize('arch', tiny_archs)
def test_a_padded_batch_gives_the_logits_of_each_row_alone(arch):
    model, tok = tiny_model(arch)
    es = [encode(tok, dict(prompt='q'*n, completion='a')) for n in (1, 9, 4)]
    batch = collate(es, tok.pad_token_id)
    assert {k: v.dtype for k,v in batch.items()} == dict.fromkeys(('input_ids', 'attention_mask', 'labels'), torch.int64)
    with torch.no_grad():
        out = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
        for i,e in enumerate(es):
            torch.testing.assert_close(out[i,:len(e['input_ids'])], model(torch.tensor([e['input_ids']])).logits[0], atol=2e-5, rtol=1e-5)

def test_collate_sides():
    es = [dict(input_ids=[1, 2], labels=[-100, 2], dropped=0), dict(input_ids=[3], labels=[3], dropped=0)]
    assert {k: v.tolist() for k,v in collate(es, 9).items()} == dict(input_ids=[[1, 2], [3, 9]], labels=[[-100, 2], [3, -100]], attention_mask=[[1, 1], [1, 0]])
    assert {k: v.tolist() for k,v in collate(es, 9, 'left').items()} == dict(input_ids=[[1, 2], [9, 3]], labels=[[-100, 2], [-100, 3]], attention_mask=[[1, 1], [0, 1]])
    with pytest.raises(ValueError, match="side='up'"): collate(es, 9, 'up')

# --- packing

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('side', ['right', 'left'])
def test_packing_leaks_nothing_trl_3067(arch, side):
    "trl#3067: packed rows see each other. Here the logits and gradients equal those of separate rows."
    model, tok = tiny_model(arch)
    rng = random.Random(0)
    es = [encode(tok, dict(messages=talk(rng, i%3 + 1))) for i in range(7)]
    longest = max(len(e['input_ids']) for e in es)
    packed = pack(es, longest + 60)
    assert len(packed) < len(es)
    batch = collate(packed, tok.pad_token_id, side)
    T = batch['input_ids'].shape[1]
    assert batch['attention_mask'].shape == (len(packed), 1, T, T) and batch['attention_mask'].dtype == torch.bool
    def loss(logits, labels): return torch.nn.functional.cross_entropy(logits[:,:-1].flatten(0, 1), labels[:,1:].flatten(), reduction='sum')
    logits = model(**{k:v for k,v in batch.items() if k != 'labels'}).logits
    alone = {tuple(e['input_ids']): model(torch.tensor([e['input_ids']])).logits[0] for e in es}
    assert len(alone) == 7
    for i,p in enumerate(packed):
        off = 0 if side == 'right' else T - len(p['input_ids'])
        for s in set(p['segment_ids']):
            at = [k for k,o in enumerate(p['segment_ids']) if o == s]
            assert [p['position_ids'][k] for k in at] == list(range(len(at)))
            want = alone.pop(tuple(p['input_ids'][k] for k in at))
            torch.testing.assert_close(logits[i, [off + k for k in at]], want, atol=3e-5, rtol=1e-5)
    assert not alone and not logits.isnan().any()
    weights = list(model.parameters())
    a = torch.autograd.grad(loss(logits, batch['labels']), weights)
    plain = collate(es, tok.pad_token_id)
    b = torch.autograd.grad(loss(model(input_ids=plain['input_ids'], attention_mask=plain['attention_mask']).logits, plain['labels']), weights)
    for x,y in zip(a, b): torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)

def test_packing_keeps_every_label_and_invents_none():
    tok, rng = tokenizer(), random.Random(1)
    es = [encode(tok, dict(messages=talk(rng, 1))) for _ in range(30)]
    packed = pack(es, 150)
    pairs = lambda rows: sorted((a, b) for e in rows for a,b in zip(e['input_ids'], e['labels'][1:]) if b != -100)
    assert pairs(packed) == pairs(es)                                   # (what is seen last, what is said next)
    assert all(len(p['input_ids']) <= 150 for p in packed) and packed == pack(es, 150)
    first = dict(input_ids=[5, 6], labels=[5, 6], dropped=0)             # a label at the start would follow from the row before
    assert pack([first, first], 9)[0]['labels'] == [-100, 6, -100, 6]
    with pytest.raises(ValueError, match='does not fit into max_length=3'): pack(es, 3)
