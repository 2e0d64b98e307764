"Words in front: where they go, and keys and values that are computed once, on every edge where the shortcut could go wrong."
import json
import pytest, torch
from torch.nn.functional import cross_entropy

from peftbook.core import Tuner, checkpoint_activations, check_tuner
from peftbook.data import Task, collate, encode, pack
from peftbook.lora import LoRA
from peftbook.models import generate, load_model, render, tiny_archs, tiny_model
from peftbook.soft_prompting import Front, SharedWords, SoftPrompting, keys_values
from peftbook.training import evaluate, fit

shots = [dict(prompt=f'question {i}', completion=f'answer {i}') for i in range(6)]
asks = ['What?', 'And how does one do it', 'Hm', 'the delay of the delay']
ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))

def soft(model, **kw): return SoftPrompting('Be kind.', shots=shots, **kw).attach(model)
def shared(tuner): return tuner._edits[0]
def took(tuner): "Was the shortcut taken since the tuner was attached?"; return shared(tuner).kept is not None

def sent(model, tok, tuner, asked, **kw):
    "The replies of the base to which all the words are sent."
    words = [tuner.messages([dict(role='user', content=q)] if isinstance(q, str) else q) for q in asked]
    with tuner.disabled(): return generate(model, tok, words, **kw)

def both(model, tok, tuner, asked, n=8, **kw):
    "The replies with the shortcut, which must be those of the words sent; and was it taken?"
    fast = generate(model, tok, asked, max_new_tokens=n, **kw)
    was = took(tuner) # before `disabled` forgets it
    assert fast == sent(model, tok, tuner, asked, max_new_tokens=n, **kw)
    return was

def padded(tok, texts): return tok(texts, add_special_tokens=False, padding=True, padding_side='left', return_tensors='pt')

# ---- the front

def front(model, n=5, seed=1):
    v = torch.randn(1, n, 32, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return v, Front(n, lambda m: keys_values(m, v))

def concatenated(model, v, ids, **kw):
    e = model.get_input_embeddings()(ids)
    return model(inputs_embeds=torch.cat((v.expand(len(ids), -1, -1), e), 1), **kw).logits[:, v.shape[1]:]

@pytest.mark.parametrize('arch', tiny_archs)
def test_front_is_concatenation(arch):
    m = tiny_model(arch)[0]
    v, f = front(m)
    want = concatenated(m, v, ids)
    f.apply(m)
    for got in (m(ids).logits, m(input_ids=ids, use_cache=False).logits, m(inputs_embeds=m.get_input_embeddings()(ids)).logits):
        assert (got - want).abs().max() < 1e-4
    grads = [torch.autograd.grad(cross_entropy(l[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), v)[0] for l in (m(ids).logits, want)]
    assert (grads[0] - grads[1]).abs().max() < 1e-5 and grads[1].abs().max() > 1e-4
    f.undo(m)
    assert not m._forward_pre_hooks

@pytest.mark.parametrize('arch', tiny_archs)
def test_padding_between_front_and_row(arch):
    "soft prompt, then padding, then text (peft#1093): a padded row is the row alone."
    m = tiny_model(arch)[0]
    _, f = front(m)
    mask = torch.ones_like(ids); mask[0, :4] = 0
    f.apply(m)
    with torch.no_grad():
        both, alone = m(input_ids=ids, attention_mask=mask).logits, m(input_ids=ids[:1, 4:]).logits
        assert (both[0, 4:] - alone[0]).abs().max() < 1e-5
        assert (both[1] - m(input_ids=ids[1:]).logits[0]).abs().max() < 1e-5

@pytest.mark.parametrize('arch', ['llama', 'qwen2', 'gptneox', 'phi3'])
def test_packed_rows_keep_to_themselves(arch):
    "Positions that are given are moved along, not recounted; the mask of pairs gets the front's places."
    m, tok = tiny_model(arch)
    _, f = front(m)
    rows = [encode(tok, r) for r in shots[:3]]
    batch = collate(pack(rows, 400), tok.pad_token_id)
    f.apply(m)
    with torch.no_grad():
        packed = m(**{k: batch[k] for k in ('input_ids', 'attention_mask', 'position_ids')}).logits[0]
        alone = [m(input_ids=torch.tensor([r['input_ids']])).logits[0] for r in sorted(rows, key=lambda r: -len(r['input_ids']))]
    assert (packed[:sum(map(len, alone))] - torch.cat(alone)).abs().max() < 1e-4

def test_mask_of_pairs_without_positions():
    m = tiny_model('llama')[0]
    v, f = front(m)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(2, 1, 9, 9)
    f.apply(m)
    with torch.no_grad():
        want = m(ids).logits
        assert (m(input_ids=ids, attention_mask=causal).logits - want).abs().max() < 1e-5
        added = torch.zeros(2, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
        assert (m(input_ids=ids, attention_mask=added).logits - want).abs().max() < 1e-5

@pytest.mark.parametrize('arch', tiny_archs)
def test_front_generates_the_same_with_and_without_cache(arch):
    "Prefix against newer Cache classes (peft#1962, #2821)."
    m = tiny_model(arch)[0]
    v, f = front(m)
    with torch.no_grad(): step = [concatenated(m, v, ids)[:, -1].argmax(-1)]
    f.apply(m)
    kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    a, b = (m.generate(ids, use_cache=c, **kw) for c in (True, False))
    assert torch.equal(a, b) and torch.equal(a[:, 9], step[0])

def test_front_under_checkpointing_says_so():
    "peft#869"
    m = tiny_model('llama')[0]
    _, f = front(m)
    f.apply(m.train())
    checkpoint_activations(m)
    with pytest.raises(ValueError, match='checkpoint_activations'): m(ids)
    checkpoint_activations(m, False)
    m(ids)

def sliding():
    "A model whose layers forget what is further back than eight tokens."
    tf = pytest.importorskip('transformers')
    _, tok = tiny_model()
    torch.manual_seed(0)
    cfg = tf.MistralConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                           max_position_embeddings=512, sliding_window=8, initializer_range=.2, pad_token_id=tok.pad_token_id)
    m = tf.AutoModelForCausalLM.from_config(cfg).eval()
    m.name_or_path = 'tiny:llama:0' # for its tokenizer
    return m, tok

def test_layers_that_forget():
    "A front would be lost there and says so; words are then sent as they are."
    m, tok = sliding()
    f = front(m)[1]
    f.apply(m)
    with pytest.raises(ValueError, match='DynamicSlidingWindowLayer'): m(ids)
    f.undo(m)
    assert not both(m, tok, soft(m), asks)

# ---- words computed once

@pytest.mark.parametrize('arch', tiny_archs)
def test_left_padding(arch):
    m, tok = tiny_model(arch)
    t = soft(m)
    assert both(m, tok, t, asks)
    assert [generate(m, tok, [q], max_new_tokens=8)[0] for q in asks] == generate(m, tok, asks, max_new_tokens=8)

@pytest.mark.parametrize('arch', tiny_archs)
def test_logits_of_every_step(arch):
    m, tok = tiny_model(arch)
    t = soft(m)
    e = padded(tok, [render(tok, q, t, reply=True) for q in asks])
    kw = dict(**e, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    kw.pop('token_type_ids', None)
    a = m.generate(**kw)
    assert took(t)
    with t.disabled(): b = m.generate(**kw)
    assert torch.equal(a.sequences, b.sequences) and (torch.stack(a.logits) - torch.stack(b.logits)).abs().max() < 1e-4
    assert a.past_key_values.get_seq_length() == b.past_key_values.get_seq_length() # what goes on from there counts right

def test_request_with_a_system_turn_of_its_own():
    "It does not begin with the shared words: one such row in the batch, and nothing is cut out."
    m, tok = tiny_model()
    own = [dict(role='system', content='Speak French.'), dict(role='user', content='Why?')]
    for asked in ([own], [own, 'What?']):
        t = soft(m)
        assert not both(m, tok, t, asked)
        t.detach()
    t = soft(m)
    assert 'Be kind.\n\nSpeak French.' in render(tok, own, t)
    generate(m, tok, [own], max_new_tokens=2); assert not took(t)
    generate(m, tok, asks, max_new_tokens=2); assert took(t)

def test_raw_text_is_not_touched():
    m, tok = tiny_model()
    t = soft(m)
    with torch.no_grad():
        tuned = m(ids).logits
        a = m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
        with t.disabled():
            assert torch.equal(m(ids).logits, tuned)
            assert torch.equal(m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0), a)
    assert not took(t)

def test_without_cache():
    m, tok = tiny_model()
    t = soft(m)
    e = padded(tok, [render(tok, q, t, reply=True) for q in asks])
    kw = dict(input_ids=e.input_ids, attention_mask=e.attention_mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    without = m.generate(use_cache=False, **kw)
    assert not took(t)
    assert torch.equal(m.generate(**kw), without) and took(t)

def test_a_call_that_wants_all_logits_gets_them():
    "Only generation asks for the last logits alone; an empty cache by itself cuts nothing out."
    from transformers import DynamicCache
    m, tok = tiny_model()
    t = soft(m)
    e = padded(tok, [render(tok, asks[0], t, reply=True)]).input_ids
    with torch.no_grad():
        full = m(e, use_cache=False).logits
        assert full.shape[1] == e.shape[1]
        got = m(input_ids=e, past_key_values=DynamicCache(config=m.config), attention_mask=torch.ones_like(e)).logits
        assert torch.equal(got, m(input_ids=e, past_key_values=DynamicCache(config=m.config)).logits) and not took(t)
        assert (got - full).abs().max() < 1e-5
        last = m(input_ids=e, past_key_values=(c := DynamicCache(config=m.config)), logits_to_keep=1) # neither mask nor positions
        assert took(t) and (last.logits[0, -1] - full[0, -1]).abs().max() < 1e-5
        nxt = torch.tensor([[9]])
        step, want = m(input_ids=nxt, past_key_values=c).logits, m(torch.cat((e, nxt), 1), use_cache=False).logits
        assert (step[0, -1] - want[0, -1]).abs().max() < 1e-5

def test_dtype_changed_after_the_first_use():
    m, tok = tiny_model()
    t = soft(m)
    assert both(m, tok, t, asks)
    for dtype in (torch.bfloat16, torch.float64):
        generate(m, tok, asks, max_new_tokens=2)
        m.to(dtype)
        replies = generate(m, tok, asks, max_new_tokens=6)
        assert {o.dtype for pair in shared(t).kept[1] for o in pair} == {dtype}
        if dtype == torch.float64: assert replies == sent(m, tok, t, asks, max_new_tokens=6)

def test_weights_changed_while_detached():
    "What was computed with the old weights is forgotten."
    m, tok = tiny_model()
    t = soft(m)
    assert both(m, tok, t, asks)
    generate(m, tok, asks, max_new_tokens=2); assert took(t)
    t.detach()
    lora = LoRA(targets='all-linear').attach(m)
    with torch.no_grad():
        for p in lora.params.values(): p.normal_(std=.3)
    lora.merge()
    t.attach(m)
    assert both(m, tok, t, asks)

def test_cache_of_another_tuner():
    "A cache belongs to the one that filled it."
    m, tok = tiny_model()
    t = soft(m)
    e = padded(tok, [render(tok, asks[0], t, reply=True)]).input_ids
    from transformers import DynamicCache
    cache = DynamicCache(config=m.config)
    with torch.no_grad():
        m(input_ids=e, past_key_values=cache, logits_to_keep=1)
        want = m(torch.cat((e, e[:, :1]), 1), use_cache=False).logits[0, -1]
        t.detach()
        other = SoftPrompting('Be brief.', n_shots=0).attach(m)
        got = m(input_ids=e[:, :1], past_key_values=cache).logits[0, -1]
    assert (got - want).abs().max() < 1e-5 and not took(other)

def test_beams_and_several_samples():
    m, tok = tiny_model()
    t = soft(m)
    e = padded(tok, [render(tok, q, t, reply=True) for q in asks])
    kw = dict(input_ids=e.input_ids, attention_mask=e.attention_mask, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    for more in (dict(num_beams=3, do_sample=False), dict(num_return_sequences=2, do_sample=True)):
        torch.manual_seed(0); a = m.generate(**kw, **more)
        assert took(t)
        with t.disabled(): torch.manual_seed(0); b = m.generate(**kw, **more)
        assert torch.equal(a, b)

def test_word_that_grows_into_the_shared_tokens(tmp_path):
    "Where the first letters of a request become one token with the end of the shared words, all is computed as usual."
    m, tok = tiny_model()
    tok.chat_template = tok.chat_template.replace("'\\n' + m['content']", "' = h' + m['content']")
    m.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    m, tok = load_model(str(tmp_path), torch.float32, 'cpu')
    t = SoftPrompting('Be kind.', n_shots=0).attach(m)
    assert tok.decode(shared(t).ids).endswith('user = h') and tok.tokenize('hey')[0] == 'he'
    assert not both(m, tok, t, ['ey'])
    t.detach().attach(m)
    assert both(m, tok, t, ['a lay'])

def test_loss_and_score():
    "`evaluate` reads the words in every row, and scores replies that took the shortcut."
    m, tok = tiny_model()
    seen = []
    task = Task('t', shots, shots[:4], shots[:4], score=lambda r, o: seen.append(o) or float(len(o)))
    base = evaluate(m, tok, task, max_new_tokens=6)
    t = soft(m)
    seen.clear()
    got = evaluate(m, tok, task, max_new_tokens=6)
    assert took(t) and got['loss'] != base['loss']
    assert seen == sent(m, tok, t, [r['prompt'] for r in task.test], max_new_tokens=6)
    rows = [dict(messages=t.messages([dict(role='user', content=r['prompt'])]) + [dict(role='assistant', content=r['completion'])]) for r in task.test]
    losses = []
    with t.disabled(), torch.no_grad():
        for r in rows: # only the last reply counts, not those of the examples
            e = encode(tok, r)
            stop = max(i for i, y in enumerate(e['labels']) if y != -100) + 1
            start = max(i for i, y in enumerate(e['labels'][:stop]) if y == -100) + 1
            l = m(torch.tensor([e['input_ids']])).logits[0]
            losses.append(cross_entropy(l[start-1:stop-1], torch.tensor(e['input_ids'][start:stop]), reduction='none'))
    assert abs(torch.cat(losses).mean().item() - got['loss']) < 1e-3
    assert evaluate(m, tok, Task('t', shots, [], shots[:4]))['loss'] == got['loss']

def test_saved_and_loaded(tmp_path):
    "As `peftbook generate` does: Tuner.load, then base and tuned answers in turn."
    m, tok = tiny_model()
    t = SoftPrompting(choose='nearest', n_shots=1, shots=shots).for_task(Task('t', shots, [], [], instruction='Be kind.'))
    t.attach(m).save(tmp_path/'a')
    want = generate(m, tok, asks, max_new_tokens=6)
    t.detach()
    info = json.loads((tmp_path/'a'/'tuner.json').read_text())
    assert info['method'] == 'soft_prompting' and info['config']['instruction'] == 'Be kind.'
    back = Tuner.load(tmp_path/'a', m)
    assert (back.config, back.params, back.cost()['bytes']) == (t.config, {}, 0)
    for q, o in zip(asks, want):
        with back.disabled(): base = generate(m, tok, [q], max_new_tokens=6)[0]
        assert generate(m, tok, [q], max_new_tokens=6)[0] == o != base
    back.detach()
    with pytest.raises(ValueError, match='another base'): Tuner.load(tmp_path/'a', tiny_model(seed=1)[0])

# ---- where the words go

def test_template_without_system_turn(tmp_path):
    "One that raises on it, and one that drops it in silence: the words open the user's first turn. Read from the model's folder."
    turn = "{{ '[' + m['role'] + '] ' + m['content'] + eos_token + '\\n' }}"
    ends = "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    raises = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + turn + "{% endfor %}" + ends
    drops = "{% for m in messages %}{% if m['role'] != 'system' %}" + turn + "{% endif %}{% endfor %}" + ends
    for i, template in enumerate((raises, drops)):
        m, tok = tiny_model()
        tok.chat_template = template
        m.save_pretrained(tmp_path/str(i)); tok.save_pretrained(tmp_path/str(i))
        m, tok = load_model(str(tmp_path/str(i)), torch.float32, 'cpu')
        t = SoftPrompting('Be kind.', n_shots=1, shots=shots).attach(m)
        text = render(tok, 'Why?', t, reply=True)
        assert not t.has_system and text.startswith('[user] Be kind.\n\nquestion') and text.endswith('[assistant] ') and text.count('Be kind.') == 1
        assert 'Be kind.\n\nSpeak French.' in render(tok, [dict(role='system', content='Speak French.'), dict(role='user', content='Why?')], t)
        assert both(m, tok, t, asks)
        t.save(tmp_path/'a'); t.detach()
        assert not Tuner.load(tmp_path/'a', m).has_system

def test_roles_alternate_and_system_stays_first():
    own = dict(role='system', content='Speak French.')
    ask = dict(role='user', content='Why?')
    with_system = [dict(messages=[own, *[dict(role=r, content='x') for r in ('user', 'assistant')]])]
    for t in (SoftPrompting('Be kind.', shots=with_system), SoftPrompting(shots=with_system), SoftPrompting('Be kind.')):
        for asked in ([ask], [own, ask], [own, ask, dict(role='assistant', content='So.'), ask]):
            for t.has_system in (True, False):
                m = t.messages(asked)
                roles = [o['role'] for o in m]
                assert 'system' not in roles[1:] and m[-1]['content'].endswith('Why?')
                turns = [r for r in roles if r != 'system']
                assert turns == (['user', 'assistant']*len(turns))[:len(turns)]
                assert sum('Be kind.' in o['content'] for o in m) == (t.instruction is not None)
                assert sum('Speak French.' in o['content'] for o in m) == (own in asked)
    assert SoftPrompting('Be kind.').messages([]) == [dict(role='system', content='Be kind.')]
    bare = SoftPrompting('Be kind.'); bare.has_system = False
    assert bare.messages([]) == [dict(role='user', content='Be kind.')]
    assert asked == [own, ask, dict(role='assistant', content='So.'), ask] # the caller's list is the caller's

def test_examples():
    t = SoftPrompting(n_shots=3, shots=shots)
    ask = [dict(role='user', content='question 4 and no other')]
    assert t.examples(ask) == t.examples([]) and len({r['prompt'] for r in t.examples(ask)}) == 3
    assert len({tuple(r['prompt'] for r in SoftPrompting(n_shots=3, seed=s, shots=shots).examples(ask)) for s in range(8)}) > 1
    near = SoftPrompting(n_shots=2, choose='nearest', shots=shots)
    assert near.examples(ask)[-1] == shots[4] and near.examples(ask) == near.examples(ask)
    assert SoftPrompting(n_shots=9, shots=shots).examples(ask) and SoftPrompting(n_shots=0, shots=shots).examples(ask) == []

def test_words_of_a_task():
    few = Task('t', [dict(prompt=str(i), completion='x') for i in range(100)], [], [], instruction=' Be kind. ', shots=tuple(shots[:2]))
    t = SoftPrompting().for_task(few)
    assert (t.instruction, t.shots) == ('Be kind.', shots[:2])
    assert SoftPrompting(n_shots=3).for_task(few).shots == SoftPrompting(choose='nearest').for_task(few).shots == few.train[:64]
    mine = SoftPrompting('Mine.', shots=shots[3:]).for_task(few)
    assert (mine.instruction, mine.shots) == ('Mine.', shots[3:])
    bare = SoftPrompting().for_task(Task('t', shots, [], []))
    assert bare.instruction is None and bare.shots == shots
    with pytest.raises(ValueError, match='needs words'): SoftPrompting(n_shots=0).for_task(Task('t', shots, [], [])).attach(tiny_model()[0])

# ---- what it promises, and refuses

@pytest.mark.parametrize('kw', [{}, dict(n_shots=0), dict(choose='nearest'), dict(n_shots=6, seed=3)])
@pytest.mark.parametrize('arch', tiny_archs)
def test_every_promise(arch, kw): check_tuner(SoftPrompting('Be kind.', shots=shots, **kw), tiny_model(arch)[0])

@pytest.mark.parametrize('kw,says', [(dict(instruction=''), 'instruction is empty'), (dict(instruction=' \n'), 'instruction is empty'), (dict(n_shots=-1), 'n_shots=-1'),
    (dict(n_shots=1.5), 'n_shots=1.5'), (dict(choose='best'), "choose='best'"), (dict(shots=[dict(prompt='x')]), r"shots\[0\].*completion")])
def test_bad_options(kw, says):
    with pytest.raises(ValueError, match=says): SoftPrompting(**kw)

def test_refusals_leave_the_model_alone():
    m, tok = tiny_model()
    for t, says in ((SoftPrompting(), 'needs words'), (SoftPrompting('Be kind. '*300), r'take \d+ tokens.*1024 positions'),
                    (SoftPrompting('Be kind.', n_shots=6, shots=[dict(prompt='why '*50, completion='so') for _ in range(6)]), 'fewer examples than n_shots=6')):
        with pytest.raises(ValueError, match=says): t.attach(m)
        assert getattr(m, 'tuner', None) is None and not m._forward_pre_hooks and all(p.requires_grad for p in m.parameters())
    t = soft(m)
    with pytest.raises(ValueError, match='trains nothing'): fit(t, tok, Task('t', shots, [], []), steps=1)
    with pytest.raises(TypeError, match='words in front of the request'): t.merge()
    with pytest.raises(ValueError, match='exceed'): generate(m, tok, ['x '*1000])

def test_request_that_is_all_words():
    "Rows that stop where the shared words do leave nothing to compute: they are sent whole."
    m, tok = tiny_model()
    t = soft(m)
    e = shared(t).ids[None]
    kw = dict(attention_mask=torch.ones_like(e), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    a = m.generate(e, **kw)
    assert not took(t)
    with t.disabled(): assert torch.equal(m.generate(e, **kw), a)

def test_only_left_padding_is_cut():
    w = SharedWords([7, 8])
    rows = torch.tensor([[0, 7, 8, 5], [7, 8, 6, 5]])
    for mask, fine in (([[0, 1, 1, 1], [1, 1, 1, 1]], True), ([[1, 1, 1, 1]]*2, False), ([[0, 1, 1, 1], [1, 1, 1, 0]], False), ([[0, 0, 1, 1], [1, 1, 1, 1]], False), ([[1, 0, 1, 1], [1, 1, 1, 1]], False)):
        assert w._begin_alike(rows, torch.tensor(mask)) == fine
