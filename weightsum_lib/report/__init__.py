"""What the study says: tables, findings, figures and the front page, from frames and results files, without torch."""
