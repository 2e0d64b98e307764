"""What the library `adapters` computes with given weights, kept in adapters_reference.json for test_adapters.py.

It needs an older transformers than peftbook does, so it runs in an environment of its own:
    python -m venv /tmp/adv && /tmp/adv/bin/pip install torch==2.13.0 && /tmp/adv/bin/pip install adapters==1.3.0
    /tmp/adv/bin/python tests/make_adapters_reference.py

Base and adapters get their numbers from a formula, so that they are the same on any version of anything.
The library's configurations are set so that they name the function that peftbook's do:
- double_seq_bn as it is but for the activation (swish there);
- seq_bn by default reads the sublayer's output plus the block's residual stream; original_ln_before=False makes it read
  the output alone (and relu becomes gelu);
- par_bn reads the stream before the block's norm, has relu and a scale of 4. ln_before=True gives it a LayerNorm of its own, into
  which GPT-2's ln_2 is copied, so that it reads what the feed-forward block reads. (Llama has an RMSNorm there, and is left out.)
"""
import json, zlib
from pathlib import Path
import torch

WIDTH, BOTTLENECK, LAYERS, VOCAB = 16, 4, 2, 16
IDS = [[3, 1, 4, 1, 5, 9]]
CASES = ('llama', 'houlsby'), ('llama', 'pfeiffer'), ('gpt2', 'houlsby'), ('gpt2', 'pfeiffer'), ('gpt2', 'parallel')
FILE = Path(__file__).with_name('adapters_reference.json')

def values(name, shape):
    "Numbers in [-.5, .5) that depend on the name and the place alone; around 1 for the weight of a norm."
    n = torch.Size(shape).numel()
    x = torch.sin(torch.arange(n, dtype=torch.float64)*12.9898 + zlib.crc32(name.encode())%1000)*43758.5453
    x = (x - x.floor() - .5).float().view(shape)
    return 1 + .5*x if name.endswith('.weight') and len(shape) == 1 else x

def base(arch):
    "A model of two blocks with the formula's numbers."
    import transformers as tf
    if arch == 'llama':
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS,
                                                   num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))
    else: model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64))
    with torch.no_grad():
        for n, p in model.named_parameters(): p.copy_(values(n, p.shape))
    return model.eval()

def adapter_values(block, place, shapes):
    "The numbers of one adapter: place is 'attention' or 'feed_forward', shapes is a dict of down and up, weight and bias."
    return {n: values(f'adapter {block} {place} {n}', s) for n, s in shapes.items()}

def logits(arch, where):
    "What the library computes."
    import adapters
    Config = dict(houlsby=adapters.DoubleSeqBnConfig, pfeiffer=adapters.SeqBnConfig, parallel=adapters.ParBnConfig)[where]
    extra = dict(houlsby={}, pfeiffer=dict(original_ln_before=False), parallel=dict(scaling=1., ln_before=True))[where]
    model = base(arch)
    adapters.init(model)
    model.add_adapter('a', config=Config(non_linearity='gelu', reduction_factor=WIDTH//BOTTLENECK, **extra))
    model.set_active_adapters('a')
    blocks, seen = model.model.layers if arch == 'llama' else model.transformer.h, 0
    for i, b in enumerate(blocks):
        for place, layer in ('attention', b.attention_adapters), ('feed_forward', b.output_adapters):
            if 'a' not in layer.adapters: continue
            a, seen = layer.adapters['a'], seen + 1
            down = next(m for m in a.adapter_down if isinstance(m, torch.nn.Linear))
            own = {'down.weight': down.weight, 'down.bias': down.bias, 'up.weight': a.adapter_up.weight, 'up.bias': a.adapter_up.bias}
            new = adapter_values(i, place, {n: p.shape for n, p in own.items()})
            with torch.no_grad():
                for n, p in own.items(): p.copy_(new[n])
                if where == 'parallel': a.adapter_norm_before.load_state_dict(b.ln_2.state_dict())
    assert seen == LAYERS*(1 + (where == 'houlsby')), seen
    with torch.no_grad(): return model.eval()(torch.tensor(IDS)).logits

if __name__ == '__main__':
    import adapters, transformers
    out = {f'{a} {w}': [round(x, 5) for x in logits(a, w).flatten().tolist()] for a, w in CASES}
    versions = dict(adapters=adapters.__version__, transformers=transformers.__version__, torch=torch.__version__)
    rows = [f'{json.dumps(k)}: {json.dumps(v)}' for k, v in (dict(versions=versions) | out).items()]
    FILE.write_text('{' + ',\n '.join(rows) + '}\n')
    print({k: (min(v), max(v)) for k, v in out.items()})
