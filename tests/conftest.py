"What all tests share: the order."

def pytest_collection_modifyitems(items):
    "The trainings of the real model first: whoever is done with them takes the small tests, so that two workers end together."
    items.sort(key=lambda item: item.path.name not in ('test_real.py', 'test_qlora.py'))
