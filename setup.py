"Package metadata lives in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {name: cfg[f'{name}_requirements'].split() for name in ('lab', 'sdxl', 'dev')}
extras['dev'] += extras['lab']+extras['sdxl']
setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
      packages=find_packages(include=['lasro*']), package_data={'lasro': ['assets/**/*']}, include_package_data=False,
      install_requires=cfg['requirements'].split(), extras_require=extras, python_requires='>='+cfg['min_python'],
      entry_points={'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
                    'console_scripts': ['lasro=lasro.command:main']})
