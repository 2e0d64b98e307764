"The package's metadata, read from settings.ini: the one place where it stands."
import sys
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']
minors = range(int(cfg['min_python'].split('.')[1]), 14)

def reqs(key): return [o for l in cfg.get(key, '').splitlines() if (o := l.partition('#')[0].strip())]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license='Apache-2.0', license_files=['LICENSE'],
    classifiers=['Development Status :: ' + statuses[int(cfg['status'])-1], 'Intended Audience :: Developers',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Natural Language :: ' + cfg['language']]
                + [f'Programming Language :: Python :: 3.{m}' for m in minors],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    install_requires=reqs('requirements'), extras_require={'dev': reqs('dev_requirements')},
    python_requires='>=' + cfg['min_python'],
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    entry_points={'console_scripts': reqs('console_scripts'), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False)
