"""Stanford Cars as in the paper: the recipe of `cub.py` on other data (Sec. 4.1).

python launch.py --config configs/cars.py --config.data.path=stanford_cars
python launch.py --config configs/cars.py:resnet101,baseline
"""

from typing import Any

from configs.cub import get_config as cub


def get_config(variant: str = "") -> Any:
    """The paper's recipe on Stanford Cars; variants as in `cub.py`."""
    config = cub(variant)
    config.data.source = "cars"
    return config
