"""What people read of a run, a sweep or rounds: what it says (sections of blocks), its charts, and the pages of it."""
