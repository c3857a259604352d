"""How a study is shown: tables, figures, sentences, a page and a document."""
