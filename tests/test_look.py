"The browser finds what a page lacks: a page for each fault."
import base64, shutil
import pytest
pytest.importorskip('playwright')
from peftbook._dev import _axe_core, local_math, look_at, npm_dist, search_leads, served, set_math

chrome = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not (chrome and shutil.which('npm')), reason='needs chromium and npm')
dot = 'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M/wHwAEBgIApD5fRAAAAABJRU5ErkJggg=='
faults = { # name -> (what stands on the page, what is said of it)
    'fine': (f'<p>Costs <code>$x$</code>.</p><img src="{dot}" width="1" height="1" alt="a dot"><pre tabindex="0">{"x"*999}</pre>', None),
    'raw': (r'<p>So \(x^2\) grows.</p>', 'formula not typeset'),
    'dollars': ('<p>So $x^2$ grows.</p>', 'formula not typeset'),
    'katex': ('<span class="katex-error">\\frac</span>', 'formula not typeset'),
    'size': (f'<img src="{dot}" alt="a dot">', 'picture without its size'),
    'words': (f'<img src="{dot}" width="1" height="1" alt=" ">', 'picture without words'),
    'svg': ('<div class="cell-output"><svg width="9" height="9"></svg></div>', 'picture without words'),
    'gone': ('<img src="gone.png" width="1" height="1" alt="a dot">', 'picture not there'),
    'wide': ('<div style="width: 3000px">wide</div>', 'scrolls sideways'),
    'outside': ('<link rel="stylesheet" href="https://example.org/a.css">', 'asks elsewhere: https://example.org/a.css'),
    'console': ('<script>console.error("oh")</script>', 'console: oh'),
    'script': ('<script>nonesuch()</script>', 'script: nonesuch is not defined'),
    'pale': ('<p style="color: #aaa">pale</p>', 'axe, color-contrast'),
    'mouse': ('<pre style="overflow: auto">' + 'x'*999 + '</pre>', 'axe, scrollable-region-focusable'),
    'heavy': ('<img src="large.svg" width="1" height="1" alt="large">', 'weighs 1.6')}

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    docs = tmp_path_factory.mktemp('docs')
    for name, (body, _) in faults.items():
        (docs/f'{name}.html').write_text(f'<!doctype html><html lang="en"><head><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><title>{name}</title></head>'
                                         f'<body><main><h1>{name}</h1><style>pre {{ overflow: auto }}</style>{body}</main></body></html>')
    (docs/'large.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>' + ' '*1_600_000)
    with served(docs) as url: return look_at(docs, [f'{n}.html' for n in faults], url, (npm_dist(*_axe_core)/'axe.min.js').read_text(), [(1280, 'light')])

@pytest.mark.parametrize('name', faults)
def test_each_fault_is_found(found, name):
    problems, want = found[f'{name}.html']['problems'], faults[name][1]
    assert any(want in o for o in problems) if want else problems == []

def test_a_search_that_finds_nothing_is_a_problem(tmp_path):
    from playwright.sync_api import sync_playwright
    (tmp_path/'index.html').write_text('<input type="search">')
    with served(tmp_path) as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chrome, args=['--no-sandbox'])
        assert search_leads(browser.new_context(), url, 'LoRA', 'lora.html')[0].startswith('search for LoRA in a window of 1280')
        browser.close()

def test_formulas_are_set_without_a_script(tmp_path):
    page = '<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/katex@0.16.11/dist/katex.min.css"><span class="math display">\\[a &lt; \\frac{1}{2}\\]</span>'
    (tmp_path/'a.html').write_text(page)
    assert local_math(tmp_path) == 1
    text = (tmp_path/'a.html').read_text()
    assert '<mfrac>' in text and '\\[' not in text and 'https://cdn' not in text
    assert list((tmp_path/'site_libs'/'katex'/'fonts').glob('*.woff2'))
    with pytest.raises(ValueError, match='nonesuch'): set_math([('\\nonesuch{', False)], npm_dist('katex', '0.16.11'))
