"""Files inside installed packages."""

from __future__ import annotations

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.storage.packaged import package_file


@pytest.mark.parametrize(
    "uri",
    [
        "package://no_such_package_anywhere/x.gguf",
        "package://no_such_package_anywhere.inner/x.gguf",
        "package://dpo_ray/no-such-file",
        "package://dpo_ray",
        "package://json.decoder/x",
    ],
)
def test_a_package_path_that_leads_nowhere_is_a_configuration_error(uri: str):
    with pytest.raises(ConfigError) as caught:
        package_file(uri)
    assert uri in str(caught.value)


def test_a_package_path_names_a_file_inside_the_package():
    assert package_file("package://pipelines/configs/demo_prompts.jsonl").name == "demo_prompts.jsonl"
