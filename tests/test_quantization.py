"The quantization routine: against bitsandbytes bit for bit, against brute force, by its properties, and its files."
import json, subprocess, sys, types
from copy import deepcopy
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from peftbook import quantization as Q
from peftbook.core import check_tuner, fingerprint, find_sites
from peftbook.lora import LoRA
from peftbook.models import tiny_model, tiny_archs
from peftbook.quantization import *

books = [('nf4', 4), ('fp4', 4), *((n, b) for n in ('nf', 'int', 'affine') for b in range(2, 9))]
tables = [(n, b) for n, b in books if n != 'affine']

def gauss(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def weights():
    "Shapes and values that go wrong somewhere: odd sizes, transposes, zeros, outliers, a sweep over every threshold."
    zero_rows = gauss(200, 100)*(torch.arange(200) % 3 == 0)[:, None]
    outliers = gauss(50, 100)*torch.tensor([1., 1000.]).repeat(50)
    return dict(plain=gauss(64, 128), odd=gauss(37, 101), short=gauss(1, 6), transposed=gauss(300, 64).T, zeros=torch.zeros(10, 100),
                outliers=outliers, sweep=torch.linspace(-1, 1, 12346).view(1, -1), zero_rows=zero_rows, sliced=gauss(40, 200)[:, ::2])

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['nf4', 'fp4'])
@pytest.mark.parametrize('double', [False, True])
def test_bitsandbytes_bit_for_bit(name, dtype, double, monkeypatch):
    F = pytest.importorskip('bitsandbytes.functional')
    for what, w in weights().items():
        for block in (32, 64, 256, 4096):
            w = w.to(dtype)
            # as one long row: with AVX512 bitsandbytes 0.50 takes wrong scales where the rows of a matrix are shorter than a block
            codes, state = F.quantize_4bit(w.reshape(1, -1), blocksize=block, quant_type=name, compress_statistics=double)
            q = quantize_tensor(w, 4, name, block, double)
            same = dict(codes=(q.codes, codes.flatten()), scales=(q.scales, state.absmax), dense=(q.dequantize(), F.dequantize_4bit(codes, state).view(w.shape)))
            if double: same |= dict(top=(q.tensors['scale_max'], state.state2.absmax), mean=(q.tensors['scale_mean'], state.offset))
            for k, (a, b) in same.items(): assert torch.equal(a, b), (what, block, k)
            for chunk in (1000, Q._chunk): # our own backend, in many runs and in one, asked past the door, which may have taken bitsandbytes
                with monkeypatch.context() as m:
                    m.setattr(Q, '_chunk', chunk)
                    assert torch.equal(Q._quantize_torch(w.reshape(-1), 4, name, block)['codes'], codes.flatten()), (what, block, chunk)
                    assert torch.equal(Q._dequantize_torch(q, dtype), q.dequantize()), (what, block, chunk)

def test_codes_are_bitsandbytes():
    F = pytest.importorskip('bitsandbytes.functional')
    for n in ('nf4', 'fp4'): assert torch.equal(codebook(n), F.get_4bit_type(n, device='cpu'))
    assert torch.equal(dynamic_code(), F.create_dynamic_map())

def test_int8_per_row_is_bitsandbytes():
    F = pytest.importorskip('bitsandbytes.functional')
    w = gauss(64, 100)
    codes, scales, _ = F.int8_vectorwise_quant(w)
    q = quantize_tensor(w, 8, 'int', None)
    assert torch.equal(q.indices().int() - 127, codes.int()) and torch.equal(q.scales, scales)
    assert all(torch.equal(t, q.tensors[n]) for n, t in Q._bnb_quantize(w.reshape(-1), 8, 'int', 100).items())

@pytest.mark.parametrize('name,bits', books)
@pytest.mark.parametrize('block', [16, 64, 100, None])
def test_nearest_by_brute_force(name, bits, block):
    w = gauss(19, 70)
    q, k = quantize_tensor(w, bits, name, block), block or 70
    v, s = codebook(name, bits), q.scales.double().repeat_interleave(k)[:w.numel()].view(w.shape)
    z = q.tensors['zeros'].double().repeat_interleave(k)[:w.numel()].view(w.shape) if name == 'affine' else 0.
    all_ = (v.double()[:, None, None] - z)*s
    best = (all_ - w.double()).abs().amin(0)
    got = all_.gather(0, q.indices().long()[None])[0]
    assert ((got - w).abs() <= best + 1e-6*s).all()
    torch.testing.assert_close(q.dequantize().double(), got, rtol=1e-6, atol=1e-9)

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(tables), st.integers(1, 6), st.integers(1, 90), st.integers(16, 70), st.floats(-6, 4), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_properties(book, rows, cols, block, magnitude, seed, dtype):
    (name, bits), w = book, (gauss(rows, cols, seed=seed)*10**magnitude).to(dtype)
    w = w.clamp(-6e4, 6e4) # fp16's range
    q = quantize_tensor(w, bits, name, block)
    assert q.dequantize().shape == w.shape and q.dequantize().dtype == dtype and q.codes.dtype == torch.uint8
    assert len(q.codes) == -(-w.numel()*bits//8) and q.nbytes == len(q.codes) + 4*len(q.scales)
    d, s = q.dequantize(torch.float32), q.scales.repeat_interleave(block)[:w.numel()].view(w.shape)
    gap = codebook(name, bits).sort()[0].diff().max()
    assert ((d - w.float()).abs() <= gap/2*s*(1 + 1e-5) + 1e-37).all()
    again = quantize_tensor(d, bits, name, block)
    if (s > 1e-36).all(): assert torch.equal(again.dequantize(), d)

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_packing(bits, vals):
    codes = torch.tensor(vals, dtype=torch.uint8) & 2**bits - 1
    p = pack_bits(codes, bits)
    text = ''.join(f'{c:0{bits}b}' for c in codes.tolist())
    text += '0'*(-len(text) % 8)
    assert p.tolist() == [int(text[i:i+8], 2) for i in range(0, len(text), 8)]
    assert torch.equal(unpack_bits(p, bits, len(codes)), codes)

@pytest.mark.parametrize('arch', tiny_archs)
def test_lora_on_top(arch):
    "QLoRA is quantize and then LoRA: all that the protocol promises but merging, which needs a dense weight."
    m = tiny_model(arch)[0]
    print_, sites = fingerprint(m), [s.name for s in find_sites(m, 'all-linear')]
    quantize(m, block_size=16)
    assert fingerprint(m) == print_ and [s.name for s in find_sites(m, 'all-linear')] == sites
    for t in (LoRA(), LoRA(r=2, targets='all-linear')):
        t.unmergeable = 'its base is quantized'
        check_tuner(t, m)

@pytest.mark.parametrize('arch', tiny_archs)
def test_quantized_model_is_its_dequantized_weights(arch):
    m, dense = tiny_model(arch)[0], tiny_model(arch)[0]
    quantize(m, 5, 'nf', 32)
    for n, l in m.named_modules():
        if isinstance(l, QuantLinear):
            d = dense.get_submodule(n)
            with torch.no_grad(): Q.weight_of(d).copy_(l.quantized.dequantize())
    ids = torch.arange(5, 17)[None]
    torch.testing.assert_close(m(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert storage_bytes(m) < storage_bytes(dense)

def test_products_are_in_pieces_where_those_are_sooner(monkeypatch):
    "Forward and back, as a dense layer's; and a bias is added."
    layer = quantize(torch.nn.Sequential(torch.nn.Linear(64, 48)).bfloat16())[0]
    taken, product = [], Q._product
    monkeypatch.setattr(Q, '_product', lambda a, b: taken.append(tuple(b.shape)) or product(a, b))
    x = torch.randn(2, 3, 64).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert taken == [(64, 48), (48, 64)]
    W = layer.quantized.dequantize(torch.bfloat16)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W, layer.bias), rtol=.02, atol=.02)
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ W)

def test_backward_keeps_no_weight():
    lin = torch.nn.Linear(64, 32)
    l = QuantLinear(quantize_tensor(lin.weight), lin.bias)
    x, kept = torch.randn(5, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t): y = l(x)
    assert not kept
    y.square().sum().backward()
    W = l.quantized.dequantize()
    torch.testing.assert_close(x.grad, 2*y.detach() @ W)
    torch.testing.assert_close(lin.bias.grad, 2*y.detach().sum(0))

def test_scales_stay_precise():
    "model.to(bf16) must not round the scales."
    l = QuantLinear(quantize_tensor(gauss(8, 64)))
    s = l.scales.clone()
    assert torch.equal(l.to(torch.bfloat16).scales, s) and l(torch.ones(1, 64).bfloat16()).dtype == torch.bfloat16

def test_tied_head():
    m = tiny_model('qwen2')[0]
    assert m.lm_head.weight is m.model.embed_tokens.weight
    quantize(m, skip=())
    assert m.lm_head.weight is m.model.embed_tokens.weight
    assert isinstance(quantize(tiny_model('gptneox')[0], skip=()).get_output_embeddings(), QuantLinear)
    assert not isinstance(quantize(tiny_model('gptneox')[0]).get_output_embeddings(), QuantLinear)

@pytest.mark.parametrize('kw,says', [(dict(bits=9, codebook='int'), 'bits=9'), (dict(bits=1, codebook='nf'), 'bits=1'), (dict(bits=3), "bits=4"), (dict(block_size=8), 'block_size=8'),
    (dict(codebook='nf5'), "codebook='nf5'"), (dict(skip=['nonesuch']), 'nonesuch'), (dict(skip='lm_head'), 'list')])
def test_errors_change_nothing(kw, says):
    m = tiny_model('llama')[0]
    with pytest.raises(ValueError, match=says.replace('(', r'\(')): quantize(m, **kw)
    assert not any(isinstance(l, QuantLinear) for l in m.modules())

def test_bad_weights_are_named():
    m = tiny_model('llama')[0]
    with torch.no_grad(): m.model.layers[1].mlp.up_proj.weight[3, 4] = float('nan')
    with pytest.raises(ValueError, match='layers.1.mlp.up_proj has NaN'): quantize(m)
    assert not any(isinstance(l, QuantLinear) for l in m.modules())
    for bad in ('nan', 'inf'):
        for name, bits in books:
            with pytest.raises(ValueError, match='NaN or infinite'): quantize_tensor(torch.tensor([[1., float(bad)]*32]), bits, name)

def test_twice_and_tuned():
    m = quantize(tiny_model('llama')[0])
    with pytest.raises(ValueError, match='quantized already'): quantize(m)
    m = tiny_model('llama')[0]
    LoRA().attach(m)
    with pytest.raises(ValueError, match='carries lora'): quantize(m)

@pytest.mark.parametrize('broken', [True, False])
def test_without_bitsandbytes(monkeypatch, broken):
    "Missing, or there and broken: the torch backend does it all."
    class Broken(types.ModuleType):
        def __getattr__(self, k): raise RuntimeError('no CUDA library')
    for n in [n for n in sys.modules if n.split('.')[0] == 'bitsandbytes']: monkeypatch.delitem(sys.modules, n)
    monkeypatch.setitem(sys.modules, 'bitsandbytes', Broken('bitsandbytes') if broken else None)
    Q._bnb.cache_clear(); Q._bnb_wins.cache_clear()
    try:
        assert Q._bnb() is None
        w = gauss(64, 64)
        assert (quantize_tensor(w, double_quant=True).dequantize() - w).abs().max() < 1
    finally: Q._bnb.cache_clear(); Q._bnb_wins.cache_clear()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    def make(arch, dtype=torch.bfloat16, **kw):
        d = tmp_path_factory.mktemp(arch)
        m, tok = tiny_model(arch, dtype=dtype)
        m.save_pretrained(d, **kw); tok.save_pretrained(d)
        return d
    return make

@pytest.mark.parametrize('arch', tiny_archs)
def test_load_quantized(arch, folder):
    "The same as quantize(load_model()), also from shards."
    for kw in ({}, dict(max_shard_size='20KB')):
        m, tok = load_quantized(folder(arch, **kw), block_size=32, dtype=torch.float32, device='cpu')
        want = quantize(tiny_model(arch)[0], block_size=32)
        a, b = m.state_dict(), want.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
        ids = torch.arange(5, 17)[None]
        assert torch.equal(m(ids).logits, want(ids).logits)
        assert fingerprint(m) == fingerprint(want)

@pytest.mark.parametrize('arch', tiny_archs)
@pytest.mark.parametrize('options', [dict(), dict(bits=5, codebook='nf', double_quant=False), dict(bits=3, codebook='affine', block_size=None)])
def test_save_and_load(arch, options, tmp_path):
    m = quantize(tiny_model(arch)[0], **options)
    save_quantized(m, tmp_path/'q')
    got, tok = load_quantized(tmp_path/'q', device='cpu')
    a, b = m.state_dict(), got.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert fingerprint(got) == fingerprint(m) and sorted(p.name for p in (tmp_path/'q').iterdir() if p.name.startswith('.')) == []
    ids = torch.arange(5, 17)[None]
    assert torch.equal(got(ids).logits, m(ids).logits)

def test_damaged_files(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    save_quantized(quantize(tiny_model('llama')[0]), tmp_path)
    f = tmp_path/'quantized.safetensors'
    with safe_open(f, 'pt') as o: meta = o.metadata()
    good = load_file(f)
    k = next(n for n in good if n.endswith('.codes'))
    save_file(good | {k: good[k][:-1].clone()}, f, meta)
    with pytest.raises(ValueError, match='nothing was loaded'): load_quantized(tmp_path)
    save_file({n: t for n, t in good.items() if n != k}, f, meta)
    with pytest.raises(ValueError, match='missing'): load_quantized(tmp_path)
    save_file(good, f, dict(meta, layers=meta['layers'].replace('"bits": 4', '"bits": 5')))
    with pytest.raises(ValueError, match='damaged'): load_quantized(tmp_path)
    save_file(good, f)
    with pytest.raises(ValueError, match='not written by save_quantized'): load_quantized(tmp_path)
    f.write_bytes(f.read_bytes()[:-50])
    with pytest.raises(ValueError, match='cannot be read as safetensors'): load_quantized(tmp_path)
    with pytest.raises(ValueError, match='no quantized layer'): save_quantized(tiny_model('llama')[0], tmp_path/'n')

PEAK = """
import json, re, sys
from pathlib import Path
from peftbook.models import load_model
from peftbook.quantization import QuantLinear, _bnb, load_quantized, quantize, storage_bytes
_bnb() # asking for the second backend imports it
quantize(load_model('tiny:llama')[0])
def kb(what): return int(re.search(rf'{what}:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])
Path('/proc/self/clear_refs').write_text('5') # the peak counts from here
before = kb('VmRSS')
model, _ = load_quantized(**json.loads(sys.argv[1]))
peak, largest = 1024*(kb('VmHWM') - before), max(p.numel()*p.element_size() for p in model.parameters())
layers = [m.quantized for m in model.modules() if isinstance(m, QuantLinear)]
bits = 8*sum(q.nbytes for q in layers)/sum(q.shape.numel() for q in layers)
own = sum(q.nbytes for q in layers) + sum(t.numel()*t.element_size() for m in model.modules() if not isinstance(m, QuantLinear) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
embed = model.get_input_embeddings().weight.nbytes # the head is the same tensor, and is counted twice above
print('>' + json.dumps(dict(peak=peak, largest=largest, bytes=storage_bytes(model), own=own - embed, bits=bits, layers=len(layers))))
"""

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the peak of a process is read as Linux tells it')
@pytest.mark.parametrize('options,most', [(dict(), 4.13), (dict(bits=5, codebook='nf'), 5.13)], ids=['nf4', '5 bits'])
def test_smollm2_is_quantized_as_it_is_read(options, most):
    "Never the dense model in memory: the peak stays below the quantized model and two of its largest tensors; the bits are those stored."
    out = subprocess.run([sys.executable, '-c', PEAK, json.dumps(options)], capture_output=True, text=True, check=True).stdout
    r = json.loads(out[out.rindex('>') + 1:])
    print(r)
    assert r['peak'] < r['bytes'] + 2*r['largest']
    assert r['layers'] == 210 and options.get('bits', 4) < r['bits'] <= most
    assert r['bytes'] == r['own']
