-- folio_control: gaps, duplicates and totals by branch, series and day, whatever a shop prints on its receipts.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
SELECT softmobile.register_branch('S2', 'Norte');
\pset null NULL
-- nothing attached
SELECT * FROM softmobile.folio_control;
CREATE TABLE sale (id integer PRIMARY KEY, store text, folio text, total numeric, sold_at timestamptz);
SELECT softmobile.attach('sale', 'sale', branch_column => 'store', folio_column => 'folio', amount_column => 'total', date_column => 'sold_at');
-- attached and empty
SELECT count(*) FROM softmobile.folio_control;

-- days are UTC, whatever the session's time zone; numbers are missing on the day of the number above them
SET TimeZone = 'America/Mexico_City';
INSERT INTO sale VALUES
	(1, 'S1', 'A-0001', 10.50, '2026-01-01 12:00+00'), (2, 'S1', 'A-0002', 20, '2026-01-01 23:59:59.999999+00'), (3, 'S1', 'A-0004', 30, '2026-01-01 13:00+00'),
	(4, 'S1', 'A-0007', NULL, '2026-01-02 00:00+00'), (5, 'S1', 'A-0005', 50, '2026-01-02 09:00+00'),
	-- a block of numbers of another till
	(6, 'S1', 'A-0100', 1, '2026-01-02 10:00+00'), (7, 'S1', 'A-0003', 2, '2026-01-03 10:00+00'),
	-- another branch has its own A
	(8, 'S2', 'A-0001', 5, '2026-01-01 12:00+00'), (9, 'S2', 'A-0003', 5, '2026-01-01 12:00+00'),
	-- rows without a branch are of softmobile.branch_id, which is S1 here
	(10, NULL, 'B1', 7, '2026-01-01 12:00+00'), (11, '  ', 'B2', 7, '2026-01-01 12:00+00'), (12, ' S2 ', 'B1', 7, '2026-01-01 12:00+00');
SELECT branch_id, entity_type, series, day, first, last, count, gaps, duplicates, total, missing, doubled, without_folio, problem FROM softmobile.folio_control;
-- ranges: gaps are those of the whole series
SELECT series, day, count, gaps, missing FROM softmobile.folio_control_of('S1', '2026-01-02', '2026-01-02');
SELECT series, day, count, gaps, missing FROM softmobile.folio_control_of('S1', "from" => '2026-01-03');
SELECT branch_id, series, day, count FROM softmobile.folio_control_of("to" => '2026-01-01');
SELECT count(*) FROM softmobile.folio_control_of('S1', '2026-02-01', '2026-02-28');
\x
SELECT * FROM failure($$SELECT softmobile.folio_control_of('S9')$$);
SELECT * FROM failure($$SELECT softmobile.folio_control_of('S1', '2026-01-03', '2026-01-02')$$);
\x
DELETE FROM sale;

-- doubled, the same day and later; blanks around it do not make another folio; another way to write the number does
INSERT INTO sale VALUES (1, 'S1', 'A-1', 1, '2026-01-01'), (2, 'S1', 'A-1', 1, '2026-01-01'), (3, 'S1', 'A-1 ', 1, '2026-01-01'), (4, 'S1', 'A-2', 1, '2026-01-01'),
	(5, 'S1', 'A-2', 1, '2026-01-02'), (6, 'S1', 'A-02', 1, '2026-01-02'), (7, 'S1', 'A-3', 1, '2026-01-02');
SELECT series, first, last, count, gaps, duplicates, missing, doubled FROM softmobile.folio_control;
DELETE FROM sale;

-- no folio, a blank one, one without digits, only digits, digits inside, several series
INSERT INTO sale VALUES (1, 'S1', NULL, 1, '2026-01-01'), (2, 'S1', '', 2, '2026-01-01'), (3, 'S1', '   ', 4, '2026-01-01'), (4, 'S1', 'MANUAL', 8, '2026-01-01'), (5, 'S1', 'MANUAL', 8, '2026-01-01'),
	(6, 'S1', '17', 1, '2026-01-01'), (7, 'S1', '15', 1, '2026-01-01'), (8, 'S1', '0', 1, '2026-01-01'), (9, 'S1', '2026/B-9x', 1, '2026-01-01'), (10, 'S1', '2026-000', 1, '2026-01-01'), (11, 'S1', '2026-001', 1, '2026-01-01'),
	(12, 'S1', 'ñ 😀 7', 1, '2026-01-01'), (13, 'S1', 'ñ 😀 9', 1, '2026-01-01'), (14, 'S1', 'A٣', 1, '2026-01-01'), (15, 'S1', '-5', 1, '2026-01-01'), (16, 'S1', '-7', 1, '2026-01-01');
SELECT series, first, last, count, gaps, duplicates, total, missing, doubled, without_folio FROM softmobile.folio_control;
DELETE FROM sale;

-- numbers that no integer holds
INSERT INTO sale VALUES (1, 'S1', 'B-1', 1, '2026-01-01'), (2, 'S1', 'B-9223372036854775806', 1, '2026-01-02'), (3, 'S1', 'B-9223372036854775808', 1, '2026-01-03'), (4, 'S1', 'B-9223372036854775810', 1, '2026-01-04'),
	(5, 'S1', 'B-123456789012345678901234567890', 1, '2026-01-05'), (6, 'S1', 'B-123456789012345678901234567892', 1, '2026-01-06');
SELECT day, first, count, gaps, missing FROM softmobile.folio_control;
INSERT INTO sale VALUES (7, 'S1', 'C-1', 1, '2026-01-01'), (8, 'S1', 'C-' || repeat('9', 131072), 1, '2026-01-01'), (9, 'S1', 'C-' || repeat('9', 131073), 1, '2026-01-01'), (10, 'S1', 'D-1', 1, '2026-01-01');
SELECT series, length(first), length(last), count, length(gaps::text), missing FROM softmobile.folio_control WHERE series > 'C';
DELETE FROM sale;

-- money that is not a number
INSERT INTO sale VALUES (1, 'S1', 'A-1', 'NaN', '2026-01-01'), (2, 'S1', 'A-2', 1, '2026-01-01'), (3, 'S1', 'A-3', 'Infinity', '2026-01-02'), (4, 'S1', 'A-4', 1, 'infinity'), (5, 'S1', 'A-5', 1, '-infinity');
SELECT day, count, gaps, total FROM softmobile.folio_control;
DELETE FROM sale;

-- rows without a date are of the day of their insert event, if the log still knows it
ALTER TABLE sale DISABLE TRIGGER "!softmobile_capture";
INSERT INTO sale VALUES (1, 'S1', 'A-1', 1, NULL);
ALTER TABLE sale ENABLE TRIGGER "!softmobile_capture";
INSERT INTO sale VALUES (2, 'S1', 'A-2', 1, NULL), (3, 'S1', 'A-4', 1, '2026-01-01');
UPDATE sale SET total = 2;
SELECT day = (SELECT max(e.created_at) AT TIME ZONE 'UTC' FROM softmobile.outbox_event e)::date AS captured, day IS NULL AS unknown, count, gaps, total FROM softmobile.folio_control;
-- with a range they are left out when nobody knows their day
SELECT sum(count) FROM softmobile.folio_control_of('S1', '-infinity', 'infinity');

-- a table without dates, with a key of two columns; folios that are numbers; money in floats
CREATE TABLE "Nota de crédito" (caja integer, "n°" varchar(5), folio bigint, importe double precision, PRIMARY KEY (caja, "n°"));
SELECT softmobile.attach('"Nota de crédito"', 'credit_note', folio_column => 'folio', amount_column => 'importe');
INSERT INTO "Nota de crédito" VALUES (1, 'a"b', 1000, 0.1), (1, 'ñ\', 1002, 0.2);
SELECT branch_id, entity_type, series, day = (SELECT max(e.created_at) AT TIME ZONE 'UTC' FROM softmobile.outbox_event e)::date AS captured, first, last, count, gaps, total, missing FROM softmobile.folio_control WHERE entity_type = 'credit_note';

-- dates and timestamps without time zone are taken as they stand; partitions and children count once
CREATE TABLE ticket (id integer, folio char(6), day date) PARTITION BY RANGE (day);
CREATE TABLE ticket_1 PARTITION OF ticket FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE ticket_2 PARTITION OF ticket FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
CREATE TABLE voucher (id integer PRIMARY KEY, folio text, at timestamp);
CREATE TABLE voucher_old (PRIMARY KEY (id)) INHERITS (voucher);
CREATE TABLE voucher_own (PRIMARY KEY (id)) INHERITS (voucher);
SELECT softmobile.attach('ticket', 'ticket', key => '{id}', folio_column => 'folio', date_column => 'day'), softmobile.attach('voucher_own', 'voucher', folio_column => 'folio', date_column => 'at'),
	softmobile.attach('voucher', 'voucher', folio_column => 'folio', date_column => 'at');
INSERT INTO ticket VALUES (1, 'T1', '2026-01-31'), (2, 'T3', '2026-02-01');
INSERT INTO voucher VALUES (1, 'V1', '2026-01-31 23:30');
INSERT INTO voucher_old VALUES (2, 'V2', '2026-01-31 23:40');
INSERT INTO voucher_own VALUES (3, 'V3', '2026-01-31 23:50');
SELECT entity_type, series, day, first, last, count, gaps, duplicates FROM softmobile.folio_control WHERE entity_type IN ('ticket', 'voucher');

-- columns of types that an ordinary user made: his casts are not run
CREATE TYPE series_no AS ENUM ('X-1', 'X-3');
CREATE FUNCTION spy(series_no) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'as %', current_user; END $$;
CREATE CAST (series_no AS text) WITH FUNCTION spy(series_no);
CREATE TABLE odd (id integer PRIMARY KEY, folio series_no);
SELECT softmobile.attach('odd', 'odd', folio_column => 'folio');
INSERT INTO odd VALUES (1, 'X-1'), (2, 'X-3'), (3, NULL);
SELECT series, first, last, count, gaps, without_folio FROM softmobile.folio_control WHERE entity_type = 'odd';

-- columns that changed their types since: what cannot be told is NULL
ALTER TABLE voucher ALTER at TYPE text;
SELECT series, day = (SELECT max(e.created_at) AT TIME ZONE 'UTC' FROM softmobile.outbox_event e)::date AS captured, count FROM softmobile.folio_control WHERE entity_type = 'voucher';
ALTER TABLE sale ALTER total TYPE text;
SELECT count(*), count(total) FROM softmobile.folio_control WHERE entity_type = 'sale';

-- a table that cannot be read says so, and hides no other
CREATE FOREIGN DATA WRAPPER regress_fdw;
CREATE SERVER regress_server FOREIGN DATA WRAPPER regress_fdw;
CREATE FOREIGN TABLE ticket_3 PARTITION OF ticket FOR VALUES FROM ('2026-03-01') TO ('2026-04-01') SERVER regress_server;
SELECT entity_type, sum(count) AS count, max(problem) AS problem FROM softmobile.folio_control GROUP BY 1 ORDER BY 1;
SET client_min_messages = warning;
DROP FOREIGN DATA WRAPPER regress_fdw CASCADE;
RESET client_min_messages;

-- the application may look, though it may not read the tables
CREATE ROLE regress_clerk;
SELECT softmobile.grant_role('regress_clerk', 'app');
SET ROLE regress_clerk;
SELECT sum(count) FROM softmobile.folio_control;
SELECT sum(count) FROM softmobile.folio_control_of('S1', '2026-01-01', '2026-01-31');
RESET ROLE;
DROP OWNED BY regress_clerk;
DROP ROLE regress_clerk;
