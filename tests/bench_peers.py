"""The same work, ours and the peer's, in one run: step times, peak memory and their ratio.

    python tests/bench_peers.py [--method lora | lora_compiled | qlora | prompt | prompt100 | prefix | full] [--dtype bf16 | fp32] [--steps 7] [--json]
    python tests/bench_peers.py --method quantize     (our NF4 and bitsandbytes', both precisions, one matrix of 4096 x 4096)
    python tests/bench_peers.py --method first_token  (16 requests behind a shared instruction: its keys and values kept, or its words sent with each)
    python tests/bench_peers.py --method whole        (LoRA on the airline task from its rows to its last step: `fit`, or PEFT in transformers' Trainer)
    python tests/bench_peers.py --method growth       (LoRA's step as rows grow longer, more, and the rank higher; three steps a point)
    python tests/bench_peers.py                       (all but the growth)

Each side runs in a process of its own; the two take their steps in turn, so that the machine's drift meets both. Before any time
is printed, losses and gradients of the two must agree. SmolLM2, batch 8 x 128, the last 32 tokens of a row supervised."""
import argparse, json, resource, subprocess, sys, tempfile, time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

usual = dict(rows=8, length=128, r=4) # what a step is made of, where nothing else is said
SUPERVISED = 32

def batch(vocab, rows, length):
    import torch
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocab - 10, (rows, length), generator=g)
    labels = ids.clone()
    labels[:, :-SUPERVISED] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)

# --- the sides: a function of the model and of what a step is made of, that makes it ready and returns (params by our names, optimizer,
# --- function that gives the mean loss, how a tensor of this side is seen in our shape)

def adam(params):
    import torch
    return torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.)

def ours(make):
    "Our side of a method."
    def ready(model, rows, length, r):
        from peftbook.speed import supervised_loss
        tuner, data = make(r).attach(model), batch(model.config.vocab_size, rows, length)
        def loss():
            total, n = supervised_loss(model, data)
            return total/n
        return tuner.params, tuner.optimizer(list(tuner.params.values()), 1e-3), loss, lambda t: t
    return ready

def peer(make, name, view=lambda model, t: t, prepare=lambda model: model):
    "PEFT's side: its configuration, our name for its tensor, our shape of it, and what is done to the base first."
    def ready(model, rows, length, r):
        import peft
        m, data = peft.get_peft_model(prepare(model), make(peft, r)), batch(model.config.vocab_size, rows, length)
        params = {name(n): p for n, p in m.named_parameters() if p.requires_grad}
        return params, adam(params), lambda: m(**data, use_cache=False).loss, lambda t: view(model, t)
    return ready

def plain(model, rows, length, r):
    "transformers and AdamW, with every weight trained."
    data, params = batch(model.config.vocab_size, rows, length), dict(model.named_parameters())
    return params, adam(params), lambda: model(**data, use_cache=False).loss, lambda t: t

def lora(r):
    from peftbook.lora import LoRA
    return LoRA(r=r, alpha=2*r, targets='qv')

def qlora(r):
    from peftbook.qlora import QLoRA
    return QLoRA(r=16, alpha=32)

def full(r):
    from peftbook.full import Full
    return Full()

def bnb_layers(model, block_size=64):
    "The same model with bitsandbytes' 4-bit layers, NF4 and double quantization, as PEFT wants to find them."
    import bitsandbytes as bnb
    for n, m in [o for o in model.named_modules() if type(o[1]).__name__ == 'Linear' and o[0] != 'lm_head']:
        new = bnb.nn.Linear4bit(m.in_features, m.out_features, m.bias is not None, compute_dtype=m.weight.dtype, compress_statistics=True, quant_type='nf4')
        new.load_state_dict(m.state_dict())
        new.weight.blocksize = block_size
        model.set_submodule(n, new.to('cpu'))
    model.is_loaded_in_4bit = True
    return model

def prompt(n):
    from peftbook.prompt_tuning import PromptTuning
    return PromptTuning(n)

def prefix(n):
    from peftbook.prefix_tuning import PrefixTuning
    return PrefixTuning(n, init='vocab')

def layers_first(model, t):
    "PEFT's rows are places, with layers, keys and values, heads and widths side by side."
    c = model.config
    return t.view(len(t), c.num_hidden_layers, 2, c.num_key_value_heads, -1).permute(1, 2, 3, 0, 4)

def lora_name(n): return n.removeprefix('base_model.model.').replace('.lora_A.default.weight', '.lora.A').replace('.lora_B.default.weight', '.lora.B')
def prompt_peer(n): return peer(lambda peft, r: peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=n), lambda name: 'prompt')

lora_sides = ours(lora), peer(lambda peft, r: peft.LoraConfig(r=r, lora_alpha=2*r, target_modules=['q_proj', 'v_proj'], lora_dropout=0.), lora_name)

sides = dict(
    lora=lora_sides,
    lora_compiled=lora_sides, # ours with `fit(..., compile=True)`, the peer as before
    qlora=(ours(qlora), peer(lambda peft, r: peft.LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', lora_dropout=0.), lora_name, prepare=bnb_layers)),
    prompt=(ours(lambda r: prompt(20)), prompt_peer(20)),
    prompt100=(ours(lambda r: prompt(100)), prompt_peer(100)),
    prefix=(ours(lambda r: prefix(20)), peer(lambda peft, r: peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=20), lambda name: 'prefix', layers_first)),
    full=(ours(full), plain))

def copy(params, view, start):
    "The same start on both sides: ours, moved off zero so that every gradient is there. (Far from words, SDPA in half precision finds another gradient.)"
    import torch
    from safetensors.torch import load_file, save_file
    if not start.exists():
        g = torch.Generator().manual_seed(0)
        save_file({n: p.detach().float() + torch.randn(p.shape, generator=g)*.02 for n, p in params.items()}, start)
    have = load_file(start)
    assert have.keys() == params.keys(), sorted(have.keys() ^ params.keys())[:4]
    with torch.no_grad():
        for n, p in params.items(): view(p).copy_(have[n])

# --- one side, as a process that takes a step whenever it reads a line

def side(method, which, dtype, folder, work):
    import torch
    from safetensors.torch import save_file
    from peftbook.models import load_model
    from peftbook.training import _training
    model = load_model(dtype=dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype])[0].train()
    own = peak()
    torch.manual_seed(0) # A starts from noise: the same start in every run of the bench
    params, opt, loss_fn, view = sides[method][which](model, **work)
    if method != 'full': copy(params, view, folder/'start.safetensors')
    say = lambda **kw: print('>' + json.dumps(kw), flush=True)
    say(ready=True)
    with _training(model, method.endswith('compiled')) if which == 0 else nullcontext(): # ours as `fit` trains it
        for n, _ in enumerate(sys.stdin):
            t = time.perf_counter()
            loss = loss_fn()
            loss.backward()
            if n == 0: save_file({k: view(p.grad).contiguous() for k, p in params.items()}, folder/f'grads{which}.safetensors')
            opt.step()
            opt.zero_grad()
            say(seconds=time.perf_counter() - t, loss=loss.item(), mb=peak() - own)

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

# --- the run

def ask(p):
    while not (line := p.stdout.readline()).startswith('>'):
        if not line: sys.exit(f'a side ended with code {p.wait()}')
    return json.loads(line[1:])

def step(p):
    p.stdin.write('step\n'); p.stdin.flush()
    return ask(p)

def compare(method, dtype, steps, **work):
    "Run both sides in turn; the result as a dict. Exits if they do not compute the same."
    with tempfile.TemporaryDirectory() as d:
        procs = []
        for which in (0, 1):
            procs.append(subprocess.Popen([sys.executable, __file__, '--side', method, str(which), dtype, d, json.dumps(usual | work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            ask(procs[-1])
        first = [step(p) for p in procs]
        gap, cos = agree(Path(d), first, dtype)
        for p in procs: step(p)
        rows = [[step(p) for p in procs] for _ in range(steps)]
        for p in procs: p.stdin.close(); p.wait()
    ours, peer = [median(r[i]['seconds'] for r in rows) for i in (0, 1)]
    mb = [rows[-1][i]['mb'] for i in (0, 1)]
    work = usual | work
    n = work['rows']*work['length']
    if not method.startswith('lora'): del work['r'] # the others have what their side says
    return work | dict(method=method, dtype=dtype, steps=steps, first=first[0]['seconds'], ours=ours, peer=peer, faster=median(r[1]['seconds']/r[0]['seconds'] for r in rows),
                ours_tokens=n/ours, peer_tokens=n/peer, ours_mb=mb[0], peer_mb=mb[1], loss_gap=gap, gradient_cosine=cos)

def agree(folder, first, dtype):
    "The gap of the losses and the cosine of the gradients; exits unless both agree within the precision."
    import torch
    from safetensors.torch import load_file
    have = [load_file(folder/f'grads{i}.safetensors') for i in (0, 1)]
    assert have[0].keys() == have[1].keys(), sorted(have[0].keys() ^ have[1].keys())[:4]
    a, b = (torch.cat([t.flatten().double() for _, t in sorted(h.items())]) for h in have)
    gap, cos = abs(first[0]['loss'] - first[1]['loss']), torch.cosine_similarity(a, b, 0).item()
    if gap > dict(bf16=.05, fp32=1e-4)[dtype] or cos < dict(bf16=.99, fp32=.99999)[dtype]: sys.exit(f'the sides differ: losses {first[0]["loss"]}, {first[1]["loss"]}, cosine of the gradients {cos}')
    return gap, cos

# --- quantization: no model and no step, so one process and one matrix

def quantizing(dtype, steps):
    "NF4 at block 64 of one matrix: our torch backend quantizes, our door dequantizes, bitsandbytes does both; in turn. Exits if the numbers differ."
    import bitsandbytes.functional as F, torch
    from peftbook.quantization import quantize_tensor, _quantize_torch
    dt = dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype]
    w = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(dt)
    q, (codes, state) = quantize_tensor(w), F.quantize_4bit(w, blocksize=64, quant_type='nf4')
    if not (torch.equal(q.codes, codes.flatten()) and torch.equal(q.dequantize(), F.dequantize_4bit(codes, state))): sys.exit('the sides differ')
    pairs = dict(quantize=(lambda: _quantize_torch(w.view(-1), 4, 'nf4', 64), lambda: F.quantize_4bit(w, blocksize=64, quant_type='nf4')),
                 dequantize=(q.dequantize, lambda: F.dequantize_4bit(codes, state)))
    for what, pair in pairs.items():
        rows = []
        for n in range(steps + 1): # who comes first finds the memory that the other has just given back: they take turns at that too
            at = {i: seconds(pair[i]) for i in ((0, 1) if n % 2 else (1, 0))}
            if n: rows.append((at[0], at[1])) # the first turn warms up
        ours, peer = [median(r[i] for r in rows) for i in (0, 1)]
        yield dict(method=what, dtype=dtype, steps=steps, ours=ours, peer=peer, faster=median(r[1]/r[0] for r in rows), ours_weights=w.numel()/ours, peer_weights=w.numel()/peer)

def seconds(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t

# --- requests behind an instruction that all of them share

def first_token(dtype, steps):
    "The first token of 16 requests of at most 40 tokens behind 300 shared ones: their keys and values kept, or the words sent with each; in turn."
    import torch
    from peftbook.models import generate, load_model, render
    from peftbook.scenarios import scenarios
    from peftbook.soft_prompting import SoftPrompting
    model, tok = load_model(dtype=dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype])
    task = scenarios['airline']()
    def count(text): return len(tok(text, add_special_tokens=False)['input_ids'])
    words = task.instruction
    while count(words + ' ' + task.instruction) < 300: words += ' ' + task.instruction
    asked = [r['prompt'] for r in task.test if count(r['prompt']) <= 40][:16]
    tuner = SoftPrompting(words, n_shots=0).attach(model)
    texts = [render(tok, q, tuner, reply=True) for q in asked]
    tok.padding_side = 'left'
    def sent():
        rows = tok(texts, add_special_tokens=False, padding=True, return_tensors='pt')
        with torch.no_grad(): return model.generate(**rows, max_new_tokens=1, do_sample=False)[:, -1]
    def ours(): return generate(model, tok, asked, max_new_tokens=1)
    with tuner.disabled(): theirs = [tok.decode(t, skip_special_tokens=True).strip() for t in sent()]
    same = sum(a == b for a, b in zip(ours(), theirs))
    if same < (16 if dtype == 'fp32' else 14): sys.exit(f'only {same} of 16 first tokens are the same') # in bf16 a close choice may turn
    rows = []
    for _ in range(steps):
        ours() # the words may have changed while the tuner was off: their keys and values are computed again, once
        own = seconds(ours)
        with tuner.disabled(): rows.append((own, seconds(sent)))
    ours_s, peer_s = [median(r[i] for r in rows) for i in (0, 1)]
    return dict(method='first_token', dtype=dtype, steps=steps, shared=count(texts[0]) - count(asked[0]), ours=ours_s, peer=peer_s, faster=median(b/a for a, b in rows), same=same)

# --- a whole run, from the rows to the last step

def whole_side(which, dtype, steps):
    "LoRA on the airline task: `fit`, or PEFT in transformers' Trainer with the same rows, rate and schedule; each in its own order."
    import torch
    from peftbook.data import collate, encode_rows
    from peftbook.lora import LoRA
    from peftbook.models import load_model
    from peftbook.scenarios import scenarios
    from peftbook.training import fit
    model, tok = load_model(dtype=dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype])
    task = scenarios['airline']()
    torch.manual_seed(0)
    t = time.perf_counter()
    if which == 0: losses = [r['loss'] for r in fit(LoRA().attach(model), tok, task, steps=steps).rows]
    else:
        import peft, transformers
        enc = encode_rows(tok, task.train)[0]
        with tempfile.TemporaryDirectory() as d:
            args = transformers.TrainingArguments(d, per_device_train_batch_size=LoRA.batch_size, max_steps=steps, learning_rate=LoRA.lr, lr_scheduler_type='cosine', warmup_steps=round(.1*steps), weight_decay=0.,
                                                  max_grad_norm=1., logging_steps=1, report_to='none', save_strategy='no', disable_tqdm=True, use_cpu=True)
            m = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'], lora_dropout=0.))
            trainer = transformers.Trainer(m, args, train_dataset=enc, data_collator=lambda rows: collate(rows, tok.pad_token_id))
            trainer.train()
        losses = [o['loss'] for o in trainer.state.log_history if 'loss' in o]
    print('>' + json.dumps(dict(seconds=time.perf_counter() - t, loss=sum(losses[-20:])/20)), flush=True)

def whole(dtype, steps=120):
    "Both whole runs, one after the other. Exits if they end at different losses."
    res = []
    for which in (0, 1):
        p = subprocess.Popen([sys.executable, __file__, '--whole', str(which), dtype, str(steps)], stdout=subprocess.PIPE, text=True)
        res.append(ask(p))
        p.wait()
    gap = abs(res[0]['loss'] - res[1]['loss'])
    if gap > .2*res[1]['loss']: sys.exit(f"the runs end at different losses: {res[0]['loss']}, {res[1]['loss']}")
    return dict(method='whole', dtype=dtype, steps=steps, ours=res[0]['seconds'], peer=res[1]['seconds'], faster=res[1]['seconds']/res[0]['seconds'], ours_loss=res[0]['loss'], peer_loss=res[1]['loss'])

# --- how cost grows

lines = dict(length=(64, 128, 256, 512, 1024), rows=(1, 2, 4, 8, 16, 32), r=(1, 4, 16, 64, 192)) # V of SmolLM2 is 192 wide: a higher rank would train numbers that add nothing, and `LoRA` refuses it

def too_much(rows, length, r, vocab=49_152):
    "Would the peer's logits, in the base's precision and in fp32, their log-softmax and its gradient, pass 16 GB?"
    return rows*length*vocab*(2 + 3*4) > 16e9

def growth(dtype):
    "LoRA's step along three lines through 8 x 128, three steps a point."
    for line, points in lines.items():
        for n in points:
            if not too_much(**usual | {line: n}): yield compare('lora', dtype, 3, **{line: n}) | dict(line=line)

def said(r):
    "A result in a line of words."
    m = r['method']
    if m in ('quantize', 'dequantize'): return f"{m} {r['dtype']}: ours {r['ours_weights']/1e6:,.0f} million weights/s, bitsandbytes {r['peer_weights']/1e6:,.0f}: {r['faster']:.2f} times as fast"
    if m == 'first_token': return f"first token of 16 requests behind {r['shared']} shared tokens, {r['dtype']}: kept {r['ours']:.2f} s, sent with each {r['peer']:.2f} s: {r['faster']:.2f} times as fast; {r['same']} of 16 tokens the same"
    if m == 'whole': return f"a whole run of {r['steps']} steps, {r['dtype']}: fit {r['ours']:.0f} s, PEFT in Trainer {r['peer']:.0f} s: {r['faster']:.2f} times as fast; last losses {r['ours_loss']:.3f} and {r['peer_loss']:.3f}"
    rank = f", r = {r['r']}" if 'r' in r else ''
    return (f"{m} {r['dtype']} {r['rows']} x {r['length']}{rank}: ours {r['ours']:.2f} s a step ({r['ours_tokens']:,.0f} tokens/s, {r['ours_mb']:,.0f} MB above the model), "
            f"peer {r['peer']:.2f} s ({r['peer_tokens']:,.0f}, {r['peer_mb']:,.0f} MB): {r['faster']:.2f} times as fast; "
            f"losses within {r['loss_gap']:.1g}, cosine of the gradients {r['gradient_cosine']:.6f}; our first step {r['first']:.1f} s")

def results(method, dtype, steps):
    "The results of a method, or of all but the growth, as they come."
    if method in ('all', 'quantize'):
        for t in ('fp32', 'bf16'): yield from quantizing(t, steps)
    for m in sides if method == 'all' else [method] if method in sides else (): yield compare(m, dtype, steps)
    if method in ('all', 'first_token'): yield first_token(dtype, steps)
    if method in ('all', 'whole'): yield whole(dtype)
    if method == 'growth': yield from growth(dtype)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--method', default='all', choices=['all', *sides, 'quantize', 'first_token', 'whole', 'growth'])
    p.add_argument('--dtype', default='bf16', choices=['bf16', 'fp32'])
    p.add_argument('--steps', type=int, default=7)
    p.add_argument('--json', action='store_true')
    args = p.parse_args()
    for r in results(args.method, args.dtype, args.steps): print(json.dumps(r) if args.json else said(r), flush=True)

if __name__ == '__main__':
    if '--side' in sys.argv: side(sys.argv[2], int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]), json.loads(sys.argv[6]))
    elif '--whole' in sys.argv: whole_side(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else: main()
