import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: minutes each; run by pytest -m slow, and by .ci/run')
    if not config.option.markexpr:
        config.option.markexpr = 'not slow'
