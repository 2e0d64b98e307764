"Prompt tuning: against concatenation, against Hugging Face PEFT with the vectors copied, and what users of PEFT ran into."
import json, warnings

import pytest, torch
from torch.nn.functional import cross_entropy

from peftbook.core import Tuner, checkpoint_activations
from peftbook.data import Task, collate, encode, pack
from peftbook.models import cache_name, generate, tiny_archs, tiny_model, tokenizer_of
from peftbook.prompt_tuning import PromptTuning, general_text, words_for
from peftbook.speed import fast_attention, supervised_loss
from peftbook.training import evaluate, fit

ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
K = 4

def tuned(arch, dtype=torch.float32, n=K):
    "A tiny model with vectors that are nobody's words, and its tuner."
    torch.manual_seed(3)
    m = tiny_model(arch, dtype=dtype)[0]
    t = PromptTuning(n).attach(m)
    with torch.no_grad(): t.params['prompt'].normal_(std=.3)
    return m, t

def loss_of(logits, ids): return cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

def rows_encoded(tok):
    said = [('Is it late?', 'We are sorry.'), ('Why?', 'Snow.'), ('And my money?', 'It was the weather, so no.'), ('So?', 'Sorry.')]
    return [encode(tok, dict(prompt=p, completion=c)) for p, c in said]

def loss_and_grad(m, t, *batches):
    "The summed loss of the batches and the prompt's gradient."
    t.params['prompt'].grad = None
    losses = [supervised_loss(m, b)[0] for b in batches]
    sum(losses).backward()
    return sum(losses).detach(), t.params['prompt'].grad.clone()

def same(a, b, tol=1e-4):
    for x, y in zip(a, b): assert (x - y).abs().max() <= tol*max(1, y.abs().max().item())

@pytest.mark.parametrize('arch', tiny_archs)
def test_equals_concatenation(arch):
    "Logits and gradient are those of the vectors put in front of the embeddings of each row."
    m, t = tuned(arch)
    logits = m(ids).logits
    loss_of(logits, ids).backward()
    with t.disabled():
        P = t.params['prompt'].detach().clone().requires_grad_()
        by_hand = m(inputs_embeds=torch.cat((P.expand(len(ids), -1, -1), m.get_input_embeddings()(ids)), 1)).logits[:, K:]
        loss_of(by_hand, ids).backward()
    same([logits, t.params['prompt'].grad], [by_hand, P.grad], 1e-5)

@pytest.mark.parametrize('arch', tiny_archs)
def test_equals_new_words_in_front_of_bos(arch):
    "The lecture's picture: K new rows of the dictionary whose tokens stand in front of BOS."
    m, t = tuned(arch)
    wider = tiny_model(arch)[0]
    V = wider.get_input_embeddings().weight.shape[0]
    wider.resize_token_embeddings(V + K, mean_resizing=False)
    W = wider.get_input_embeddings().weight
    with torch.no_grad(): W[V:] = t.params['prompt']
    rows = torch.cat((torch.full((2, 1), tokenizer_of(m).bos_token_id), ids), 1)
    longer = torch.cat((torch.arange(V, V + K).expand(2, -1), rows), 1)
    a, b = m(rows).logits, wider(longer).logits[:, K:, :V]
    loss_of(a, rows).backward(); loss_of(b, rows).backward()
    same([a, t.params['prompt'].grad], [b, W.grad[V:]], 1e-5)

def peft_twin(t, arch, dtype=torch.float32):
    "PEFT's prompt tuning of the same base with the same vectors."
    peft = pytest.importorskip('peft')
    theirs = peft.get_peft_model(tiny_model(arch, dtype=dtype)[0], peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=t.n_tokens)).eval()
    with torch.no_grad(): theirs.prompt_encoder['default'].embedding.weight.copy_(t.params['prompt'])
    return theirs

@pytest.mark.parametrize('arch', tiny_archs)
def test_parity_with_peft(arch):
    m, t = tuned(arch)
    theirs = peft_twin(t, arch)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0 # padded on the right
    a, b = m(input_ids=ids, attention_mask=mask).logits, theirs(input_ids=ids, attention_mask=mask).logits[:, K:]
    a, b = (o[mask.bool()] for o in (a, b))
    target = ids[mask.bool()]
    for l in (a, b): cross_entropy(l, target).backward()
    same([a, t.params['prompt'].grad], [b, theirs.prompt_encoder['default'].embedding.weight.grad], 1e-5)

def test_three_steps_agree_with_peft():
    "Three AdamW steps from the same start end at the same vectors."
    m, t = tuned('llama')
    theirs = peft_twin(t, 'llama')
    for model, cut in ((m, 0), (theirs, K)):
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.)
        for _ in range(3):
            loss_of(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, cut:], ids).backward()
            opt.step(); opt.zero_grad()
    assert (t.params['prompt'] - theirs.prompt_encoder['default'].embedding.weight).abs().max() < 1e-5

@pytest.mark.parametrize('arch', tiny_archs)
def test_padding_stands_in_front_of_the_prompt_not_behind(arch):
    "peft#1093: vectors, then padding, then text. A row padded on the left gets the logits that it gets alone, positions given or not."
    m, t = tuned(arch)
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[0, :3], mask[0, :3] = 0, 0
    pos = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = m(ids[:1, 3:]).logits[0], m(ids[1:]).logits[0]
    for kw in ({}, dict(position_ids=pos)):
        both = m(input_ids=batch, attention_mask=mask, **kw).logits
        same([both[0, 3:], both[1]], alone, 1e-5)

def test_peft_counts_positions_through_the_padding():
    "What ours is spared: in PEFT, which drops position_ids, a row padded on the left is not the row alone where positions are learned."
    m, t = tuned('gpt2')
    theirs = peft_twin(t, 'gpt2')
    batch, mask = ids[:1].clone(), torch.ones_like(ids[:1])
    batch[0, :3], mask[0, :3] = 0, 0
    def gap(model, cut): # logits of the row padded less those of the row alone
        a = model(input_ids=batch, attention_mask=mask).logits[0, 3 + cut:]
        b = model(input_ids=ids[:1, 3:], attention_mask=torch.ones(1, 3, dtype=torch.long)).logits[0, cut:]
        return (a - b).abs().max().item()
    assert gap(m, 0) < 1e-5 < 1e-2 < gap(theirs, K)

@pytest.mark.parametrize('arch', tiny_archs)
def test_packed_rows_are_the_rows_alone(arch):
    "trl#3067, under a prompt: the same loss and gradient in one line, padded on either side, and one by one."
    m, t = tuned(arch)
    enc = rows_encoded(tokenizer_of(m))
    alone = loss_and_grad(m, t, *[collate([e], 0) for e in enc])
    for batch in (collate(pack(enc, 400), 0), collate(pack(enc, 90), 0), collate(enc, 0), collate(enc, 0, side='left')):
        same(loss_and_grad(m, t, batch), alone)

def test_a_packed_row_sees_the_prompt_and_no_other_row():
    "A changed row moves no loss but its own; a changed prompt moves all."
    m, t = tuned('llama')
    tok = tokenizer_of(m)
    packed = pack(rows_encoded(tok)[:3], 400)
    batch = collate(packed, 0)
    seg = torch.tensor(packed[0]['segment_ids'])
    other = dict(batch, input_ids=batch['input_ids'].clone())
    other['input_ids'][0, seg == 1] = 7
    def logits(b): return m(**{k: b[k] for k in ('input_ids', 'attention_mask', 'position_ids')}, use_cache=False).logits[0].detach()
    a, b = logits(batch), logits(other)
    assert torch.equal(a[seg != 1], b[seg != 1]) and not torch.allclose(a[seg == 1], b[seg == 1])
    with torch.no_grad(): t.params['prompt'] += .1
    moved = (logits(batch) - a).abs().amax(-1)
    assert all(moved[seg == i].max() > 1e-3 for i in range(3))

@pytest.mark.parametrize('arch', tiny_archs)
def test_generation_with_cache_equals_without(arch):
    "peft#1962, #2821: with the cache, without it, in a padded batch and alone: the same tokens."
    m, t = tuned(arch)
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[0, :3], mask[0, :3] = 0, 0
    kw = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    a, b = (m.generate(batch, attention_mask=mask, use_cache=c, **kw)[:, 6:] for c in (True, False))
    alone = m.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], **kw)[:, 3:]
    assert torch.equal(a, b) and torch.equal(a[:1], alone)

def test_beams_agree_with_and_without_cache():
    m, t = tuned('qwen2')
    kw = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    assert torch.equal(m.generate(ids, use_cache=True, **kw), m.generate(ids, use_cache=False, **kw))

def test_checkpointing_says_why_not():
    "peft#869, #137: transformers drops the cache under checkpointing, and the prompt would be lost without a word."
    m, t = tuned('llama')
    m.train(); checkpoint_activations(m)
    with pytest.raises(ValueError, match='gradient checkpointing'): m(ids)
    checkpoint_activations(m, False)
    m(ids)

def test_trains_in_fp32_on_a_bf16_base():
    "peft#1249: the vectors keep the bits that small steps need."
    m, t = tuned('llama', torch.bfloat16)
    p = t.params['prompt']
    assert p.dtype == torch.float32 and m(ids).logits.dtype == torch.bfloat16
    before = p.detach().clone()
    opt = t.optimizer(t.params.values(), 1e-5)
    loss_of(m(ids).logits, ids).backward()
    opt.step()
    assert 0 < (p - before).abs().max() < 1e-4
    assert m.get_input_embeddings().weight.dtype == torch.bfloat16

@pytest.mark.parametrize('arch', tiny_archs)
def test_start_is_on_the_manifold(arch):
    "peft#2816: by default each vector is a word's, and no special token's."
    m, tok = tiny_model(arch)
    W = m.get_input_embeddings().weight
    torch.manual_seed(0)
    p = PromptTuning(50).attach(m).params['prompt']
    found = (p[:, None] == W[None]).all(-1).int().argmax(1)
    assert torch.equal(W[found], p) and not set(found.tolist()) & {*tok.all_special_ids, *tok.added_tokens_decoder}

def test_start_from_text():
    m, tok = tiny_model()
    whole = tok('Be kind.', add_special_tokens=False).input_ids
    for n in (len(whole), len(whole) + 3): # exact, and repeated until it suffices
        t = PromptTuning(n, init='text', text='Be kind.').attach(m)
        assert torch.equal(t.params['prompt'], m.get_input_embeddings()(torch.tensor((whole*2)[:n])))
        t.detach()
    assert words_for(m, 5, 'text').tolist() == tok(general_text).input_ids[:5]

def test_start_is_chance_of_the_seed_alone():
    m = tiny_model()[0]
    def start(seed, init):
        torch.manual_seed(seed)
        return PromptTuning(6, init=init).attach(m).detach().params['prompt'].clone()
    for init in ('vocab', 'random'):
        assert torch.equal(start(1, init), start(1, init)) and not torch.equal(start(1, init), start(2, init))

def test_random_start_has_the_spread_of_what_layers_see():
    "Some embeddings scale their vectors (Gemma's): the noise follows what comes out, not the table."
    m = tiny_model()[0]
    emb = m.get_input_embeddings()
    h = emb.register_forward_hook(lambda m, args, out: 10*out)
    p = PromptTuning(200, init='random').attach(m).params['prompt']
    h.remove()
    assert abs(p.std().item()/(10*emb.weight.std().item()) - 1) < .1

@pytest.mark.parametrize('kw,says', [(dict(n_tokens=0), 'n_tokens=0'), (dict(n_tokens=2.5), 'n_tokens=2.5'), (dict(n_tokens=1024), '1024 positions'),
    (dict(n_tokens=2, init='text', text='far too many words'), 'more than n_tokens=2'), (dict(init='zeros'), "init='zeros'"),
    (dict(init='text', text=' '), 'text is empty'), (dict(text='Be kind.'), "init='text'")])
def test_refuses(kw, says):
    m = tiny_model()[0]
    with pytest.raises(ValueError, match=says): PromptTuning(**kw).attach(m)
    assert not hasattr(m, 'tuner') and 'prompt' not in dict(m.named_parameters())

def test_merge_says_why_not():
    m, t = tuned('llama')
    with pytest.raises(TypeError, match='in front of the input'): t.merge()

def test_prompt_and_request_share_the_context():
    "A request that fits the bare model but not beside the vectors is refused before anything is computed."
    m, tok = tiny_model()
    t = PromptTuning(1000).attach(m)
    with pytest.raises(ValueError, match='exceed the 24 positions'): generate(m, tok, ['a request of many words, many words, many words'])
    task = Task('t', [dict(prompt='a long one '*10, completion='no')]*2, [], [])
    assert fit(t, tok, task, steps=1).rows # the row is shortened to what room there is
    t.detach()
    assert generate(m, tok, ['a request of many words, many words, many words'], max_new_tokens=2)

def test_file_holds_the_vectors_alone(tmp_path):
    "peft#2092, #2898: K x d numbers and nothing of the base; loading draws no words and needs no seed."
    from safetensors.torch import load_file
    m, t = tuned('gpt2')
    wanted = m(ids).logits.detach()
    t.save(tmp_path)
    held = load_file(tmp_path/'adapter_model.safetensors')
    assert {k: tuple(v.shape) for k, v in held.items()} == {'prompt': (K, 32)}
    assert json.loads((tmp_path/'tuner.json').read_text())['method'] == 'prompt_tuning'
    t.detach()
    state = torch.get_rng_state()
    back = Tuner.load(tmp_path, m)
    assert torch.equal(m(ids).logits, wanted) and torch.equal(torch.get_rng_state(), state)
    back.detach()
    with pytest.raises(ValueError, match='another base'): Tuner.load(tmp_path, tiny_model('gpt2', seed=1)[0])

def test_prompts_are_swapped_without_touching_the_model():
    m = tiny_model()[0]
    base, state = m(ids).logits.detach(), {n: p.detach().clone() for n, p in m.named_parameters()}
    a, b = (PromptTuning(n, init='random').attach(m).detach() for n in (3, 7))
    out = {}
    for t in (a, b, a, b):
        t.attach(m)
        logits = m(ids).logits.detach()
        assert torch.equal(out.setdefault(id(t), logits), logits)
        t.detach()
    assert torch.equal(m(ids).logits, base) and {n for n, _ in m.named_parameters()} == state.keys()
    assert all(torch.equal(p, state[n]) for n, p in m.named_parameters())

def test_vectors_run_through_the_base_once_a_step():
    m, t = tuned('llama', n=20)
    seen = []
    m.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2]))
    m(torch.randint(5, 250, (8, 32)))
    assert seen == [(1, 20), (8, 32)]

def test_fit_packed_equals_fit_padded():
    "One step on all rows: packed into one line or a row each, the vectors end at the same place."
    ends = []
    for packed in (None, 400):
        m, tok = tiny_model()
        torch.manual_seed(0)
        t = PromptTuning(3).attach(m)
        rows = [dict(prompt=p, completion=c) for p, c in (('Is it late?', 'Yes.'), ('Why?', 'Snow.'), ('And?', 'Sorry.'))]
        fit(t, tok, Task('t', rows, [], []), steps=2, batch_size=3, pack=packed)
        ends.append(t.params['prompt'].detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-4

def test_evaluate_goes_through_the_prompt():
    m, tok = tiny_model()
    task = Task('t', *[[dict(prompt='late?', completion='No')]]*3)
    bare = evaluate(m, tok, task)['loss']
    torch.manual_seed(0)
    t = PromptTuning(8).attach(m)
    fit(t, tok, task, steps=60, lr=.2)
    assert evaluate(m, tok, task)['loss'] < bare/2
    with t.disabled(): assert evaluate(m, tok, task)['loss'] == bare

def test_no_warnings():
    "transformers warns of caches and positions that it does not like; a user sees none of that."
    m, t = tuned('llama')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loss_of(m(ids, use_cache=False).logits, ids).backward()
        m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)

# --- in one line with the rows, while `fit` trains

def batches_of(arch, tok):
    "Rows as a collator leaves them: padded on the right, on the left, packed, and without a mask."
    enc = rows_encoded(tok)
    right = collate(enc, tok.pad_token_id)
    lens = right['attention_mask'].sum(1).tolist()
    left = {k: torch.stack([t.roll(len(t) - n) for t, n in zip(v, lens)]) for k, v in right.items() if k in ('input_ids', 'attention_mask', 'labels')}
    return dict(right=right, left=left, packed=collate(pack(enc, 64), tok.pad_token_id), bare={k: right[k] for k in ('input_ids', 'labels')})

@pytest.mark.parametrize('kind', ['right', 'left', 'packed', 'bare'])
@pytest.mark.parametrize('arch', tiny_archs)
def test_in_one_line_loss_and_gradient_are_the_same(arch, kind, monkeypatch):
    "Vectors and rows go through the layers together, and the vectors once: as if they stood in the cache."
    m, t = tuned(arch)
    batch = batches_of(arch, tokenizer_of(m))[kind]
    want = loss_and_grad(m, t, batch)
    monkeypatch.setattr('peftbook.prompt_tuning.Front.put', None) # not called
    seen = []
    h = m.get_input_embeddings().register_forward_hook(lambda m, args, y: seen.append(args[0].shape))
    with fast_attention(m): got = loss_and_grad(m, t, batch)
    h.remove()
    assert seen == [batch['input_ids'].shape]
    same(got, want, 1e-5)

def test_in_one_line_other_calls_are_as_ever():
    "Within `fast_attention` too: a call that keeps its cache, that wants all states, that does not train; and one after a step that failed midway."
    m, t = tuned('llama')
    want, states = m(ids).logits, m(ids, output_hidden_states=True, use_cache=False).hidden_states
    with fast_attention(m):
        assert m(ids).logits.shape == want.shape and m(ids)[cache_name(m)].get_seq_length() == K + 6
        with torch.no_grad(): same([m(ids, use_cache=False).logits], [want], 1e-5)
        same(m(ids, output_hidden_states=True, use_cache=False).hidden_states, states, 1e-5)
        def fails(*args): raise KeyboardInterrupt
        h = m.model.layers[1].register_forward_pre_hook(fails)
        with pytest.raises(KeyboardInterrupt): m(ids, use_cache=False)
        h.remove()
        same([m(ids).logits, m(ids, use_cache=False).logits], [want, want], 1e-5)
    same([m(ids).logits], [want], 0)
    t.detach()
    assert not m.get_output_embeddings()._forward_pre_hooks

def test_in_one_line_checkpointing_is_refused_as_ever():
    m, t = tuned('llama')
    m.train()
    checkpoint_activations(m)
    with fast_attention(m), pytest.raises(ValueError, match='does not survive gradient checkpointing'): supervised_loss(m, dict(input_ids=ids, labels=ids))

@pytest.mark.parametrize('arch', tiny_archs)
def test_in_one_line_in_half_precision(arch):
    "No further from fp32's gradient than by way of the cache, over several batches, but for a fifth."
    far = {True: 0., False: 0.}
    for seed in range(6):
        torch.manual_seed(seed)
        batch = dict(input_ids=(x := torch.randint(5, 250, (3, 12))), labels=x)
        exact = loss_and_grad(*tuned(arch), batch)[1].double()
        for line in far:
            m, t = tuned(arch, torch.bfloat16)
            if line:
                with fast_attention(m): g = loss_and_grad(m, t, batch)[1]
            else: g = loss_and_grad(m, t, batch)[1]
            far[line] += ((g.double() - exact).norm()/exact.norm()).item()
    assert far[True] < 1.2*far[False] and far[True] < 6*.1
