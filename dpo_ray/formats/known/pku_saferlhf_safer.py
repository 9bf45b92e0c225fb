"""PKU-SafeRLHF, by which response is safer: taken where that alone is told, or where it is named."""

from __future__ import annotations

from dpo_ray.formats.numbered import numbered

FORMAT = numbered("pku_saferlhf_safer", "safer_response_id", absent=("better_response_id",))
