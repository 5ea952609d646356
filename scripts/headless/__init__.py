"""Running a workflow without a browser: file to prompt (``convert``), its settings (``settings``), the server
(``client``)."""
