"""What came of it: margins, accuracies and win rates with their intervals, how far two engines agree, and the pages
that tell people: the report of a run and the card of a published model."""
