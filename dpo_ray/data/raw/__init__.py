"""Raw preference files: which kinds there are, how a file is looked at, scanned and cut into parts, and how the rows of
a part are read. What a row means is not known here."""
