"""The same work, ours and the peer's, in one run: step times, peak memory and their ratio.

    python tests/bench_peers.py [--method lora | qlora | prompt | prompt100 | prefix | all] [--dtype bf16 | fp32] [--steps 7] [--json]
    python tests/bench_peers.py --method quantize     (our NF4 and bitsandbytes', both precisions, one matrix of 4096 x 4096)

Each side runs in a process of its own; the two take their steps in turn, so that the machine's drift meets both. Before any time
is printed, losses and adapter gradients of the two must agree. SmolLM2, batch 8 x 128, the last 32 tokens of a row supervised."""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median

B, T, SUPERVISED = 8, 128, 32

def batch(vocab):
    import torch
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocab - 10, (B, T), generator=g)
    labels = ids.clone()
    labels[:, :-SUPERVISED] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)

# --- the sides: a function of the model that makes it ready and returns (params by our names, function that gives the mean loss,
# --- how a tensor of this side is seen in our shape)

def ours(make):
    "Our side of a method."
    def ready(model):
        from peftbook.speed import fast_attention, supervised_loss
        tuner, data = make().attach(model), batch(model.config.vocab_size)
        fast_attention(model).__enter__() # as `fit` does, for the life of this process
        def loss():
            total, n = supervised_loss(model, data)
            return total/n
        return tuner.params, loss, lambda t: t
    return ready

def peer(make, name, view=lambda model, t: t, prepare=lambda model: model):
    "PEFT's side: its configuration, our name for its tensor, our shape of it, and what is done to the base first."
    def ready(model):
        import peft
        m, data = peft.get_peft_model(prepare(model), make(peft)), batch(model.config.vocab_size)
        params = {name(n): p for n, p in m.named_parameters() if p.requires_grad}
        return params, lambda: m(**data, use_cache=False).loss, lambda t: view(model, t)
    return ready

def lora():
    from peftbook.lora import LoRA
    return LoRA(r=4, alpha=8, targets='qv')

def qlora():
    from peftbook.qlora import QLoRA
    return QLoRA(r=16, alpha=32)

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
def prompt_peer(n): return peer(lambda peft: peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=n), lambda name: 'prompt')

sides = dict(
    lora=(ours(lora), peer(lambda peft: peft.LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'], lora_dropout=0.), lora_name)),
    qlora=(ours(qlora), peer(lambda peft: peft.LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', lora_dropout=0.), lora_name, prepare=bnb_layers)),
    prompt=(ours(lambda: prompt(20)), prompt_peer(20)),
    prompt100=(ours(lambda: prompt(100)), prompt_peer(100)),
    prefix=(ours(lambda: prefix(20)), peer(lambda peft: peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=20), lambda name: 'prefix', layers_first)))

def copy(params, view, start):
    "The same start on both sides, off zero so that every gradient is there."
    import torch
    from safetensors.torch import load_file, save_file
    if not start.exists():
        g = torch.Generator().manual_seed(0)
        save_file({n: torch.randn(p.shape, generator=g)*.02 for n, p in params.items()}, start)
    have = load_file(start)
    assert have.keys() == params.keys(), sorted(have.keys() ^ params.keys())[:4]
    with torch.no_grad():
        for n, p in params.items(): view(p).copy_(have[n])

# --- one side, as a process that takes a step whenever it reads a line

def side(method, which, dtype, folder):
    import torch
    from safetensors.torch import save_file
    from peftbook.models import load_model
    model = load_model(dtype=dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype])[0].train()
    own = peak()
    params, loss_fn, view = sides[method][which](model)
    copy(params, view, folder/'start.safetensors')
    opt = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.)
    say = lambda **kw: print('>' + json.dumps(kw), flush=True)
    say(ready=True)
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

def compare(method, dtype, steps):
    "Run both sides in turn; the result as a dict. Exits if they do not compute the same."
    with tempfile.TemporaryDirectory() as d:
        procs = []
        for which in (0, 1):
            procs.append(subprocess.Popen([sys.executable, __file__, '--side', method, str(which), dtype, d], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            ask(procs[-1])
        first = [step(p) for p in procs]
        gap, cos = agree(Path(d), first, dtype)
        for p in procs: step(p)
        rows = [[step(p) for p in procs] for _ in range(steps)]
        for p in procs: p.stdin.close(); p.wait()
    ours, peer = [median(r[i]['seconds'] for r in rows) for i in (0, 1)]
    mb = [rows[-1][i]['mb'] for i in (0, 1)]
    return dict(method=method, dtype=dtype, steps=steps, ours=ours, peer=peer, faster=median(r[1]['seconds']/r[0]['seconds'] for r in rows),
                ours_tokens=B*T/ours, peer_tokens=B*T/peer, ours_mb=mb[0], peer_mb=mb[1], loss_gap=gap, gradient_cosine=cos)

def agree(folder, first, dtype):
    "The gap of the losses and the cosine of the gradients; exits unless both agree within the precision."
    import torch
    from safetensors.torch import load_file
    a, b = (torch.cat([t.flatten().double() for _, t in sorted(load_file(folder/f'grads{i}.safetensors').items())]) for i in (0, 1))
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

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--method', default='all', choices=['all', *sides, 'quantize'])
    p.add_argument('--dtype', default='bf16', choices=['bf16', 'fp32'])
    p.add_argument('--steps', type=int, default=7)
    p.add_argument('--json', action='store_true')
    args = p.parse_args()
    for dtype in ('fp32', 'bf16') if args.method in ('all', 'quantize') else ():
        for r in quantizing(dtype, args.steps):
            if args.json: print(json.dumps(r))
            else: print(f"{r['method']} {dtype}: ours {r['ours_weights']/1e6:,.0f} million weights/s, bitsandbytes {r['peer_weights']/1e6:,.0f}: {r['faster']:.2f} times as fast")
    for m in sides if args.method == 'all' else [args.method] if args.method in sides else ():
        r = compare(m, args.dtype, args.steps)
        if args.json: print(json.dumps(r))
        else: print(f"{m} {args.dtype}: ours {r['ours']:.2f} s a step ({r['ours_tokens']:,.0f} tokens/s, {r['ours_mb']:,.0f} MB above the model), "
                    f"PEFT {r['peer']:.2f} s ({r['peer_tokens']:,.0f}, {r['peer_mb']:,.0f} MB): {r['faster']:.2f} times as fast; "
                    f"losses within {r['loss_gap']:.1g}, cosine of the gradients {r['gradient_cosine']:.6f}")

if __name__ == '__main__':
    if '--side' in sys.argv: side(sys.argv[2], int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
    else: main()
