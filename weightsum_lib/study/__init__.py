"""One run of the study, all its runs, and what is measured on them."""
