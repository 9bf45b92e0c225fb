"""The formats in which preference data are published: by which columns and first rows each is recognised, and how its
rows become rows of a layout. Pure functions of rows, which load nothing; how files are read is not known here."""
