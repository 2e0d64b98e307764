"The instrument: sizes that are known before it looks."
import pytest, torch
from peftbook.costs import *

def test_the_peak_counts_what_is_alive_at_once_and_nothing_older():
    n = 1_000_000
    old = torch.zeros(n)
    def one_after_the_other():
        for _ in range(3): torch.zeros(n)
    def three_at_once(): return torch.zeros(n), torch.zeros(n), old + 1
    assert peak_bytes(one_after_the_other) == 4*n
    assert 0 <= peak_bytes(three_at_once) - 12*n < 100

def test_a_backward_pass_is_seen():
    w, x = torch.zeros(1000, 1000, requires_grad=True), torch.ones(10, 1000)
    assert 0 <= peak_bytes(lambda: (x @ w).sum().backward()) - 4_000_000 - 40_000 < 50_000 # the gradient of w, and the product

def test_the_profiler_is_silent(capfd):
    peak_bytes(lambda: torch.zeros(10))
    assert capfd.readouterr() == ('', '')

def test_another_device_says_what_there_is():
    with pytest.raises(ValueError, match="device='mps'.*'cpu' and 'cuda'"): peak_bytes(lambda: None, 'mps')

def test_the_colours_of_the_style_are_no_method_s():
    "Else a line that is no method's would look like one."
    from matplotlib.colors import to_rgb
    from matplotlib.rcsetup import validate_cycler
    from peftbook.compare import lecture
    from peftbook.models import figure_style
    style, methods = [to_rgb(c['color']) for c in validate_cycler(figure_style['axes.prop_cycle'])], [to_rgb(look_of(m)['color']) for m in lecture]
    assert len(set(style)) == 10 # as many as the planner has parts
    for c in style: assert min(sum((x - y)**2 for x, y in zip(c, m))**.5 for m in methods) > .15
