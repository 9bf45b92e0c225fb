"""PKU-SafeRLHF, by which response is more helpful."""

from __future__ import annotations

from dpo_ray.formats.numbered import numbered

FORMAT = numbered("pku_saferlhf", "better_response_id")
