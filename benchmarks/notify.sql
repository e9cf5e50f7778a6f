-- What pgbench sends: a notification as Odoo's, for a channel that nobody has subscribed to.
SELECT pg_notify('imbus', '["nobody"]');
