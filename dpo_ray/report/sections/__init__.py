"""The sections of a run's report, one file each: what a run has recorded → blocks; nothing measured, no section."""
