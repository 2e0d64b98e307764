"The repository agrees with itself: settings, README, badges, site, and what may import what."
import ast, builtins, importlib, json, re, subprocess, sys
from pathlib import Path
import pytest
from peftbook._dev import badges, chapters, directives, page_name, read_nb, readme, settings, source

root = Path(__file__).resolve().parent.parent
cfg = settings(root)
nbs = root/cfg['nbs_path']
notebooks = sorted(nbs.glob('*.ipynb'))
modules = {d['default_exp']: p for p in chapters(nbs) for c in read_nb(p)['cells'] if 'default_exp' in (d := directives(c))}
public = [m for m in modules if not m.startswith('_')]
lib = root/cfg['lib_path']
not_in_all = {'all', 'cli', 'compare'}  # `cli` holds the shell's names, and alone imports `compare`
heavy = 'transformers accelerate matplotlib bitsandbytes ipywidgets datasets peft gguf tokenizers safetensors huggingface_hub'.split()

each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize('module', modules)

def code_cells(path): return [(i, c) for i, c in enumerate(read_nb(path)['cells']) if c['cell_type'] == 'code']
def tree(module): return ast.parse((lib/f'{module}.py').read_text(encoding='utf-8'))

def imported(body):
    "The modules that statements import, as dotted names; those of the package begin with a dot."
    for o in (n for s in body for n in ast.walk(s)):
        if isinstance(o, ast.Import): yield from (a.name for a in o.names)
        if isinstance(o, ast.ImportFrom): yield '.'*o.level + (o.module or '')

def place(name):
    "Where a module of the package stands in the book."
    name = name.removeprefix('peftbook.').removeprefix('.')
    assert name in modules, f'no chapter exports {name}'
    return list(modules).index(name)

def python_of(cell):
    "A cell's code without IPython's magics."
    return re.sub(r'(?m)^(\s*)[%!].*$', r'\1pass', source(cell))

# ---- what is said twice is said alike

def test_readme_is_the_front_page(): assert readme(root, check=True) == []
def test_badges_are_those_of_settings(): assert badges(root, check=True) == []

def test_site_has_the_settings_addresses():
    import yaml
    quarto = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    web = quarto['website']
    assert quarto['project']['output-dir'] == cfg['doc_path']
    assert (web['title'], web['description'], web['repo-branch'], web['repo-subdir']) == (cfg['title'], cfg['description'], cfg['branch'], cfg['nbs_path'])
    assert (web['repo-url'], web['site-url']) == (cfg['git_url'], cfg['doc_host'] + cfg['doc_baseurl'])
    assert (nbs/'_quarto.yml').read_text().strip() == 'metadata-files: [../_quarto.yml]'

def test_sidebar_lists_every_chapter_once_and_in_order():
    text = (root/'_quarto.yml').read_text(encoding='utf-8')
    assert re.findall(r'(?m)^\s*- (\d\S+\.ipynb)$', text) == [p.name for p in chapters(nbs)]

def test_addresses_stand_in_settings_only():
    here = {'settings.ini', '_quarto.yml', 'README.md'}
    files = [p for p in [*root.glob('*'), *root.glob('.github/workflows/*'), *root.glob('.ci/*'), *lib.glob('*.py')] if p.is_file() and p.name not in here]
    address = f"{cfg['user']}/{cfg['repo']}"
    assert [p.name for p in files if p.name != '_modidx.py' and address in p.read_text(encoding='utf-8', errors='ignore')] == []
    for p, (i, c) in ((p, ic) for p in notebooks for ic in enumerate(read_nb(p)['cells'])):
        if 'Open in Colab' not in source(c) and 'google.colab' not in source(c): assert f'github.com/{address}' not in source(c), f'{p.name}, cell {i}'

def test_version_is_the_settings_one():
    import peftbook
    assert peftbook.__version__ == cfg['version']
    assert f"## {cfg['version']}" in (root/'CHANGELOG.md').read_text()

def test_readme_begins_with_the_two_commands():
    first, second, *_ = re.findall(r'(?ms)^```sh\n(.*?)^```', (root/'README.md').read_text(encoding='utf-8'))
    assert first.startswith('pip install -e . && peftbook tune lora --task airline')
    assert first.rstrip().endswith('--out airline') and '/airline/' in (root/'.gitignore').read_text()
    assert 'nbdev_test' in second and second.rstrip().endswith('pytest -q -n 2 --dist worksteal tests')

# ---- names

def test_public_names_are_unique_and_shadow_nothing():
    owner = {}
    for m in public:
        if m == 'all': continue
        for name in importlib.import_module(f'peftbook.{m}').__all__:
            assert name not in owner, f'{name} is in {owner[name]} and in {m}'
            assert not hasattr(builtins, name), f'{m}.{name} shadows a builtin'
            owner[name] = m

def test_all_gives_every_public_name():
    import peftbook.all
    for m in set(public) - not_in_all:
        missing = [n for n in importlib.import_module(f'peftbook.{m}').__all__ if n not in peftbook.all.__all__ or not hasattr(peftbook.all, n)]
        assert not missing, f'peftbook.all lacks {missing} of {m}: add it to 91_all'

@each_module
def test_a_chapter_is_named_after_its_module(module):
    page = {'full_finetuning': 'full'} # the design's one exception
    assert page.get(name := page_name(modules[module]), name) == module.lstrip('_') and (lib/f'{module}.py').exists()

def test_no_module_without_a_chapter():
    assert {p.stem for p in lib.glob('*.py')} - {'__init__', '_modidx'} == set(modules)

# ---- imports

@each_module
def test_imports_run_one_way(module):
    inside = [name for name in imported(tree(module).body) if name.startswith(('.', 'peftbook.'))]
    for name in inside: assert place(name) < place(module), f'{module} imports {name}, a later chapter'
    if module not in ('cli', 'all'): assert '.compare' not in inside

@each_notebook
def test_no_chapter_needs_a_later_one(path):
    here = next((m for m, p in modules.items() if p == path), None)
    for i, c in code_cells(path):
        if here is None or not (body := python_of(c)).strip(): continue
        for name in imported(ast.parse(body).body):
            if not name.startswith('peftbook.'): continue
            assert place(name) <= place(here), f'{path.name}, cell {i} imports {name}, a later chapter'

@each_notebook
def test_chapters_do_not_import_nbdev(path):
    if path.name == '99_dev.ipynb': return
    for i, c in code_cells(path):
        names = {name.partition('.')[0] for name in imported(ast.parse(python_of(c)).body)}
        assert not names & {'nbdev', 'execnb', 'smalldocs'}, f'{path.name}, cell {i}'

@each_module
def test_modules_import_nothing_heavy_at_the_top(module):
    top = [s for s in tree(module).body if isinstance(s, (ast.Import, ast.ImportFrom))]
    assert not {name.partition('.')[0] for name in imported(top)} & {*heavy, 'nbdev', 'execnb', 'smalldocs', 'nbclient', 'nbformat', 'yaml'}

def test_import_of_all_is_light():
    code = f'import sys, json, peftbook.all; print(json.dumps([o for o in {heavy} if o in sys.modules]))'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    assert json.loads(res.stdout) == []

@each_module
def test_no_pickle_and_no_remote_code(module):
    for o in ast.walk(tree(module)):
        if isinstance(o, ast.Call):
            name = ast.unparse(o.func)
            assert name not in ('eval', 'exec'), f'{module}, line {o.lineno}: {name}'
            if name in ('torch.load', 'torch.save'):
                kw = {k.arg: ast.unparse(k.value) for k in o.keywords}
                assert name == 'torch.load' and kw.get('weights_only') == 'True', f'{module}, line {o.lineno}: {name} pickles'
            remote = [k for k in o.keywords if k.arg == 'trust_remote_code' and ast.unparse(k.value) != 'False']
            assert not remote, f'{module}, line {o.lineno}: trust_remote_code'
    assert not {n.partition('.')[0] for n in imported(tree(module).body)} & {'pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal'}

# ---- cells

@each_notebook
def test_cells_are_short_and_saved_without_an_error(path):
    assert not [i for i, c in code_cells(path) if len(source(c).splitlines()) > 40]
    assert not [i for i, c in code_cells(path) if any(o['output_type'] == 'error' for o in c['outputs'])]

@each_notebook
def test_imports_have_cells_of_their_own(path):
    "To show signatures nbdev runs exported cells and those with an import, but no others: such a cell must stand alone."
    alone = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef
    mixed = []
    for i, c in code_cells(path):
        d = directives(c)
        if d.get('eval') == 'false' or d.keys() & {'export', 'exports', 'exporti'}: continue
        body = ast.parse(python_of(c)).body
        if list(imported(body)) and not all(isinstance(s, alone) for s in body): mixed.append(f'cell {i}: {source(c)[:60]!r}')
    assert not mixed

@each_notebook
def test_notebooks_keep_no_widget_state(path): assert 'widgets' not in read_nb(path)['metadata']

@each_notebook
def test_figures_have_the_look_of_the_book(path):
    "A chapter that draws takes the style first, and names no colour of its own but black, white and greys: a method's comes from `look_of`, the others' from the style."
    if path.name == '99_dev.ipynb': return
    cells = [python_of(c) for _, c in code_cells(path)]
    draws = [i for i, t in enumerate(cells) if 'plt.subplots(' in t and 'import matplotlib' not in t]
    if not draws: return
    assert any('plt.rcParams.update(figure_style)' in t for t in cells[:draws[0]])
    named = {c for _, o in code_cells(path) if not directives(o).keys() & {'export', 'exports'} for c in re.findall("'(#[0-9a-f]{3,6})'", source(o))}
    assert not [c for c in named if not re.fullmatch(r'#(..)\1\1|#(.)\2\2', c)]

def test_front_page_is_fast(): assert not [i for i, c in code_cells(nbs/cfg['readme_nb']) if 'slow' in directives(c)]

@pytest.mark.parametrize('path', [p for p in sorted((root/'nbs').glob('[0-9]*.ipynb'))], ids=lambda p: p.stem)
def test_a_chapter_reads_in_twenty_minutes(path):
    "220 words of prose or 40 lines of code a minute; what the page folds or hides is not counted."
    words = code = 0
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        text = ''.join(c['source'])
        if c['cell_type'] == 'markdown': words += len(re.sub(r'<details>.*?</details>', '', text, flags=re.S).split())
        elif not re.search(r'(?m)^#\| *(hide|export$|default_exp|fold$)', text): code += sum(bool(l.strip()) and not l.startswith('#|') for l in text.splitlines())
    assert words/220 + code/40 < 20
