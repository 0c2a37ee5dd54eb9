-- Invariant 1: every way to change a row of an attached table makes exactly one event.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
CREATE TABLE sale (id integer PRIMARY KEY, folio text, total numeric(12,2), note text);
SELECT softmobile.attach('sale', 'sale', folio_column => 'folio', amount_column => 'total');

-- INSERT, UPDATE, DELETE
INSERT INTO sale VALUES (1, 'A-1', 10.50), (2, 'A-2', 20);
UPDATE sale SET total = total + 1, note = 'x' WHERE id = 1;
UPDATE sale SET total = total WHERE id = 2;
DELETE FROM sale WHERE id = 2;
SELECT op, entity, id, branch, reason, folio, amount, payload FROM fresh();
-- rows that are not there
UPDATE sale SET total = 0 WHERE id = 99;
DELETE FROM sale WHERE id = 99;
SELECT count(*) FROM fresh();
-- an actor is the role of the session, whatever function runs
SELECT DISTINCT actor = current_user AS actor_is_me FROM events;

-- RETURNING, DEFAULT VALUES and serial keys: lastval() stays the application's
CREATE TABLE ticket (id serial PRIMARY KEY, at timestamptz DEFAULT '2026-01-01 00:00+00');
SELECT softmobile.attach('ticket', 'repair_order');
INSERT INTO ticket DEFAULT VALUES RETURNING id;
SELECT lastval(), currval('ticket_id_seq');
INSERT INTO ticket (at) SELECT '2026-01-02 03:04:05+00' FROM generate_series(1, 2) RETURNING id;
SELECT lastval();
UPDATE ticket SET at = at WHERE id = 1 RETURNING id;
DELETE FROM ticket WHERE id = 3 RETURNING id;
SELECT op, entity, id, payload FROM fresh();

-- COPY
COPY sale FROM stdin;
10	C-1	1.00	copied
11	\N	\N	\N
\.
SELECT op, id, folio, amount, payload FROM fresh();

-- MERGE
MERGE INTO sale s USING (VALUES (10, 5), (11, NULL), (12, 7)) AS v (id, total) ON s.id = v.id
WHEN MATCHED AND v.total IS NULL THEN DELETE
WHEN MATCHED THEN UPDATE SET total = v.total
WHEN NOT MATCHED THEN INSERT (id, total) VALUES (v.id, v.total);
SELECT op, id, payload FROM fresh() ORDER BY id;
MERGE INTO sale s USING (VALUES (10)) AS v (id) ON s.id = v.id WHEN MATCHED THEN DO NOTHING;
SELECT count(*) FROM fresh();

-- ON CONFLICT
INSERT INTO sale VALUES (10, 'again') ON CONFLICT DO NOTHING;
SELECT count(*) FROM fresh();
INSERT INTO sale VALUES (10, 'D-1', 1), (13, 'D-2', 2) ON CONFLICT (id) DO UPDATE SET folio = excluded.folio;
INSERT INTO sale VALUES (10, 'D-3') ON CONFLICT (id) DO UPDATE SET folio = excluded.folio WHERE false;
SELECT op, id, payload FROM fresh();

-- several in one statement
WITH added AS (INSERT INTO sale VALUES (20, 'E-1'), (21, 'E-2') RETURNING id),
	changed AS (UPDATE sale SET note = 'cte' WHERE id = 13 RETURNING id),
	removed AS (DELETE FROM sale WHERE id = 12 RETURNING id)
SELECT (SELECT count(*) FROM added) + (SELECT count(*) FROM changed) + (SELECT count(*) FROM removed) AS rows;
SELECT op, id FROM fresh() ORDER BY id;

-- a key that changes is another entity
UPDATE sale SET id = 30, note = 'moved' WHERE id = 20;
SELECT op, id, payload FROM fresh();

-- branches: from a column, the second one where the first is null, the setting; a change is a delete here, an insert there
SELECT softmobile.register_branch('S2', 'Norte'), softmobile.register_branch('3', 'Sur');
CREATE TABLE transfer (id integer PRIMARY KEY, origin char(4), destination integer);
SELECT softmobile.attach('transfer', 'transfer_order', branch_column => 'origin', branch_fallback_column => 'destination');
INSERT INTO transfer VALUES (1, 'S2', 3), (2, NULL, 3), (3, NULL, NULL), (4, '', 3), (5, ' S2', 3);
SELECT op, id, branch, payload FROM fresh() ORDER BY id;
UPDATE transfer SET origin = 'S2' WHERE id = 2;
UPDATE transfer SET destination = NULL WHERE id = 2;
SELECT op, id, branch, payload FROM fresh() ORDER BY branch DESC, place;
-- what can be no branch id does not count
CREATE TABLE odd_branch (id integer PRIMARY KEY, branch text);
SELECT softmobile.attach('odd_branch', 'odd', branch_column => 'branch');
INSERT INTO odd_branch VALUES (1, ''), (2, '   '), (3, E'a\tb'), (4, repeat('x', 101)), (5, 'S2');
SELECT id, branch FROM fresh();

-- keys: composite, given, of odd types
CREATE TABLE line (sale integer, n smallint, sku text, PRIMARY KEY (n, sale));
CREATE TABLE keyless (code text, day timestamptz);
CREATE TABLE coded (code char(5) PRIMARY KEY);
CREATE TABLE timed (at timestamptz PRIMARY KEY);
SELECT softmobile.attach('line', 'sale_line'), softmobile.attach('keyless', 'inventory', key => '{day,code}'),
	softmobile.attach('coded', 'repair'), softmobile.attach('timed', 'return');
INSERT INTO line VALUES (7, 1, 'it''s "x"');
INSERT INTO keyless VALUES ('c"1', '2026-01-01 12:00+00'), (NULL, NULL);
INSERT INTO coded VALUES ('ab');
SET timezone = 'America/Mexico_City';
SET datestyle = 'SQL, DMY';
INSERT INTO timed VALUES ('2026-01-01 12:00+00');
INSERT INTO keyless VALUES ('d', '2026-01-01 12:00+00');
RESET timezone;
RESET datestyle;
UPDATE timed SET at = at;
SELECT op, entity, id, payload FROM fresh();

-- foreign keys: what cascades is captured in its own table
CREATE TABLE customer (id integer PRIMARY KEY);
CREATE TABLE invoice (id integer PRIMARY KEY, customer integer REFERENCES customer ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE payment (id integer PRIMARY KEY, invoice integer DEFAULT 0 REFERENCES invoice ON DELETE SET NULL);
SELECT softmobile.attach('customer', 'customer'), softmobile.attach('invoice', 'invoice'), softmobile.attach('payment', 'payment');
INSERT INTO customer VALUES (1);
INSERT INTO invoice VALUES (10, 1), (11, 1);
INSERT INTO payment VALUES (100, 10);
SELECT count(*) FROM fresh();
UPDATE customer SET id = 2;
DELETE FROM customer;
SELECT op, entity, id, payload FROM fresh();
-- TRUNCATE tells no trigger which rows go
SET client_min_messages = warning;
SELECT * FROM failure('TRUNCATE invoice CASCADE') \gx
SELECT message FROM failure('TRUNCATE customer CASCADE');
SELECT softmobile.detach('invoice');
SELECT message FROM failure('TRUNCATE invoice CASCADE');
SELECT softmobile.attach('invoice', 'invoice');
RESET client_min_messages;
SELECT count(*) FROM fresh();
-- a row that refers to its own table
CREATE TABLE account (id integer PRIMARY KEY, parent integer REFERENCES account ON DELETE CASCADE ON UPDATE CASCADE);
SELECT softmobile.attach('account', 'account');
INSERT INTO account VALUES (1, NULL), (2, 1), (3, 2);
SELECT count(*) FROM fresh();
UPDATE account SET id = id + 10;
SELECT op, id, payload FROM fresh();
DELETE FROM account WHERE id = 11;
SELECT op, id FROM fresh();
-- what a foreign key refuses leaves nothing
INSERT INTO payment VALUES (101, 99);
SELECT count(*) FROM fresh();

-- views: automatically updatable, and with INSTEAD OF
CREATE VIEW sale_view AS SELECT id, folio FROM sale;
INSERT INTO sale_view VALUES (40, 'V-1');
CREATE FUNCTION into_sale() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO sale (id, folio) VALUES (new.id, new.folio || '!');
	RETURN new;
END
$$;
CREATE TRIGGER instead INSTEAD OF INSERT ON sale_view FOR EACH ROW EXECUTE FUNCTION into_sale();
INSERT INTO sale_view VALUES (41, 'V-2');
SELECT op, entity, id, payload FROM fresh();

-- rules, and tables of odd names
CREATE SCHEMA "o'dd ""schema";
CREATE TABLE "o'dd ""schema"."account_invoice_line-stock_move" ("Id" integer PRIMARY KEY, "día %s" text, "q""q" text DEFAULT 'q', "it's" integer);
SELECT softmobile.attach('"o''dd ""schema"."account_invoice_line-stock_move"', 'stock_move-x');
INSERT INTO "o'dd ""schema"."account_invoice_line-stock_move" VALUES (1, 'ñ', DEFAULT, 2);
CREATE RULE also AS ON INSERT TO keyless DO ALSO DELETE FROM "o'dd ""schema"."account_invoice_line-stock_move";
INSERT INTO keyless VALUES ('rule', '2026-02-01 00:00+00');
SELECT op, entity, id, payload FROM fresh();
SELECT softmobile.detach('"o''dd ""schema"."account_invoice_line-stock_move"');
SET client_min_messages = warning;
DROP SCHEMA "o'dd ""schema" CASCADE;
RESET client_min_messages;

-- the switches
SET softmobile.enable_purchases_sales = off;
INSERT INTO sale VALUES (50);
INSERT INTO customer VALUES (50);
SET softmobile.enable_transfers = off;
INSERT INTO transfer VALUES (50);
RESET softmobile.enable_purchases_sales;
SET softmobile.enable_hybrid_prep = off;
INSERT INTO customer VALUES (51);
INSERT INTO sale VALUES (51);
SELECT op, entity, id FROM fresh();
RESET softmobile.enable_transfers;
RESET softmobile.enable_hybrid_prep;

-- the selling role needs no rights on softmobile
CREATE ROLE regress_cashier;
GRANT USAGE ON SCHEMA shop TO regress_cashier;
GRANT ALL ON sale TO regress_cashier;
SET ROLE regress_cashier;
INSERT INTO sale VALUES (60);
UPDATE sale SET note = 'by the cashier' WHERE id = 60;
SELECT has_table_privilege('softmobile.outbox_event_1', 'SELECT, INSERT') AS on_log, has_table_privilege('softmobile.captured_table', 'SELECT') AS on_captured;
INSERT INTO softmobile.outbox_event_1 SELECT;
RESET ROLE;
SELECT op, id, actor FROM fresh();
REVOKE ALL ON sale FROM regress_cashier;
REVOKE ALL ON SCHEMA shop FROM regress_cashier;
DROP ROLE regress_cashier;

-- numbers have no holes where nothing was rolled back
SELECT count(DISTINCT e.seq) = max(e.seq) - min(e.seq) + 1 AS dense FROM softmobile.outbox_event e
JOIN softmobile.outbox_lane l USING (lane_id) WHERE l.priority = 'HIGH' AND l.branch_id = 'S1' GROUP BY lane_id;
SELECT count(*) = count(DISTINCT id) AS ids_unique, bool_and(substr(id::text, 15, 1) = '7') AS version_7,
	bool_and(abs(extract(epoch FROM e.created_at) * 1000 - ('x' || translate(substr(id::text, 1, 13), '-', ''))::bit(48)::bigint) <= 1) AS id_holds_time
FROM softmobile.outbox_event e;
