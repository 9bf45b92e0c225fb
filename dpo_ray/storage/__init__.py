"""Where things lie: paths on this machine and in object stores, files of packages, artifacts with their manifests and
shards, and which of these nothing refers to any more.

It knows nothing of preference data, models or the configuration. Paths come in as they were typed, and leave as a
Location; what is written is whole or not there at all.
"""
