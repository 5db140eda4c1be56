"""Speed as a record: gate, time, floor, CSV."""
