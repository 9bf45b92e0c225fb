"""Preference data as functions of rows: from bytes in a raw file to canonical pairs to token ids.

Every rule that a row must keep stands here under its name, and so does what is known of rows together: duplicates, and
the report on what the data are like. No model enters, and no torch: workers that only carry rows start without it.
"""
