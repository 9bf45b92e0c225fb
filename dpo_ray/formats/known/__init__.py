"""One file a format, called as the format is: `data.layout` names it by that. `FORMAT` is what it declares."""
