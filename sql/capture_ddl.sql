-- Capture goes on while its tables are altered; what it needs cannot be dropped.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
SELECT softmobile.register_branch('S2', 'Norte');
CREATE TABLE sale (gone_1 integer, id integer PRIMARY KEY, gone_2 text, store text, folio text, total numeric, why text, gone_3 integer);
INSERT INTO sale VALUES (1, 1, 'x', 'S2', 'A-1', 1, 'inserted before', 3);
SELECT softmobile.attach('sale', 'sale', branch_column => 'store', folio_column => 'folio', amount_column => 'total', reason_column => 'why');

-- columns that come and go: first, middle, last
ALTER TABLE sale DROP COLUMN gone_1, DROP COLUMN gone_2, DROP COLUMN gone_3;
INSERT INTO sale VALUES (2, 'S2', 'A-2', 2, NULL);
ALTER TABLE sale ADD COLUMN note text DEFAULT 'added with default', ADD COLUMN empty integer;
UPDATE sale SET empty = NULL WHERE id = 1;
UPDATE sale SET note = note || '.' WHERE id = 2;
SELECT op, id, branch, folio, amount, reason, payload FROM fresh();

-- renamed columns are followed, two that change their names as well
ALTER TABLE sale RENAME id TO sale_id;
ALTER TABLE sale RENAME store TO sucursal_id;
ALTER TABLE sale RENAME why TO motivo;
ALTER TABLE sale RENAME folio TO tmp;
ALTER TABLE sale RENAME note TO folio;
ALTER TABLE sale RENAME tmp TO note;
ALTER TABLE sale RENAME total TO importe;
INSERT INTO sale VALUES (3, 'S2', 'A-3', 3, 'a reason of its own');
SELECT op, id, branch, folio, amount, reason, payload FROM fresh();
SELECT key_columns, branch_columns, reason_column, folio_column, amount_column FROM softmobile.captured_table;
-- the table itself renamed and moved
CREATE SCHEMA other;
ALTER TABLE sale RENAME TO venta;
ALTER TABLE venta SET SCHEMA other;
INSERT INTO other.venta VALUES (4, 'S2', 'A-4', 4, NULL);
ALTER TABLE other.venta SET SCHEMA shop;
ALTER TABLE venta RENAME TO sale;
SELECT op, id, folio FROM fresh();
DROP SCHEMA other;

-- types that change, with and without a rewrite
ALTER TABLE sale ALTER sale_id TYPE bigint, ALTER note TYPE varchar(50);
INSERT INTO sale VALUES (50000000000, 'S2', 'A-5', 5, NULL);
ALTER TABLE sale ALTER importe TYPE text;
UPDATE sale SET importe = '6' WHERE sale_id = 4;
ALTER TABLE sale ALTER importe TYPE numeric USING importe::numeric;
UPDATE sale SET importe = 7 WHERE sale_id = 4;
SELECT op, id, folio, amount, payload FROM fresh();

-- what capture needs cannot be dropped
SELECT * FROM failure('ALTER TABLE sale DROP COLUMN sale_id') \gx
SELECT message FROM failure('ALTER TABLE sale DROP COLUMN sucursal_id');
SELECT message FROM failure('ALTER TABLE sale DROP COLUMN note');
SELECT message FROM failure('ALTER TABLE sale DROP COLUMN importe');
SELECT message FROM failure('ALTER TABLE sale DROP COLUMN motivo');
SELECT message FROM failure('ALTER TABLE sale DROP COLUMN sale_id, ADD COLUMN other integer');
CREATE TYPE payment AS ENUM ('cash', 'card');
CREATE TABLE till (method payment PRIMARY KEY, n integer);
SELECT softmobile.attach('till', 'till');
SET client_min_messages = warning;
SELECT message FROM failure('DROP TYPE payment CASCADE');
RESET client_min_messages;
INSERT INTO till VALUES ('cash', 1);
-- the primary key itself may go: its columns stay
ALTER TABLE till DROP CONSTRAINT till_pkey;
INSERT INTO till VALUES ('card', 2);
-- a column that was dropped and added again under its name is that column
ALTER TABLE till RENAME n TO m;
ALTER TABLE till ADD COLUMN n integer;
UPDATE till SET n = m;
SELECT op, entity, id, payload FROM fresh();

-- columns that only folio_control and reconcile() read are followed, and kept, like the others
CREATE TABLE move (id integer PRIMARY KEY, at date, sku text, quantity integer);
SELECT softmobile.attach('move', 'inventory_movement', date_column => 'at', sku_column => 'sku', quantity_column => 'quantity');
ALTER TABLE move RENAME at TO happened_on;
ALTER TABLE move RENAME sku TO swap;
ALTER TABLE move RENAME quantity TO sku;
ALTER TABLE move RENAME swap TO quantity;
SELECT date_column, sku_column, quantity_column, column_numbers FROM softmobile.captured_table WHERE relation = 'move'::regclass;
SELECT message FROM failure('ALTER TABLE move DROP COLUMN happened_on');
SELECT message FROM failure('ALTER TABLE move DROP COLUMN sku');
SELECT message FROM failure('ALTER TABLE move DROP COLUMN quantity');
INSERT INTO move VALUES (1, '2026-01-31', 'SKU-1', 3);
SELECT op, id, payload FROM fresh();
SELECT softmobile.detach('move');

-- tables of a type
CREATE TYPE thing AS (id integer, label text);
CREATE TABLE thing_1 OF thing (PRIMARY KEY (id));
SELECT softmobile.attach('thing_1', 'thing');
ALTER TYPE thing RENAME ATTRIBUTE id TO number CASCADE;
INSERT INTO thing_1 VALUES (1, 'a');
ALTER TYPE thing ADD ATTRIBUTE more integer CASCADE;
INSERT INTO thing_1 VALUES (2, 'b', 3);
SELECT message FROM failure('ALTER TYPE thing DROP ATTRIBUTE number CASCADE');
SELECT op, id, payload FROM fresh();

-- column numbers of another database, as a restore brings them: a rename finds its column all the same
UPDATE softmobile.captured_table SET column_numbers = array(SELECT n + 1 FROM unnest(column_numbers) AS n) WHERE relation = 'till'::regclass;
ALTER TABLE till RENAME method TO how;
INSERT INTO till VALUES ('cash', 3);
SELECT op, id FROM fresh();

-- DDL in replica mode is followed too
SET session_replication_role = replica;
ALTER TABLE till RENAME how TO method;
INSERT INTO till VALUES ('cash', 4);
TRUNCATE till;
RESET session_replication_role;
INSERT INTO till VALUES ('card', 5);
SELECT op, id FROM fresh();

-- disabled triggers: nothing is captured, and nothing breaks
ALTER TABLE till DISABLE TRIGGER ALL;
INSERT INTO till VALUES ('card', 6);
ALTER TABLE till ENABLE TRIGGER ALL;
INSERT INTO till VALUES ('card', 7);
SELECT op, payload FROM fresh();
-- ENABLE ALWAYS is the administrator's choice
ALTER TABLE till ENABLE ALWAYS TRIGGER "!softmobile_capture";
SET session_replication_role = replica;
INSERT INTO till VALUES ('card', 8);
RESET session_replication_role;
SELECT op, payload FROM fresh();

-- detach, again, attach again, in one transaction, rolled back
SELECT softmobile.detach('till');
INSERT INTO till VALUES ('card', 9);
SELECT * FROM failure($$SELECT softmobile.detach('till')$$) \gx
BEGIN;
SELECT softmobile.attach('till', 'till', key => '{method}');
INSERT INTO till VALUES ('card', 10);
ROLLBACK;
INSERT INTO till VALUES ('card', 11);
SELECT count(*) FROM fresh();
BEGIN;
SELECT softmobile.attach('till', 'till', key => '{method}');
INSERT INTO till VALUES ('card', 12);
SELECT softmobile.detach('till');
INSERT INTO till VALUES ('card', 13);
SELECT softmobile.attach('till', 'till', key => '{method,m}');
INSERT INTO till VALUES ('card', 14);
COMMIT;
INSERT INTO till VALUES ('card', 15);
SELECT op, id, payload FROM fresh();
SELECT action, count(*) FROM softmobile.sync_audit WHERE details ->> 'table' = 'shop.till' GROUP BY 1 ORDER BY 1;

-- a trigger without its table: somebody copied it
CREATE TABLE stray (id integer PRIMARY KEY);
CREATE TRIGGER stray AFTER INSERT ON stray FOR EACH ROW EXECUTE FUNCTION softmobile.capture();
SELECT * FROM failure('INSERT INTO stray VALUES (1)') \gx
DROP TRIGGER stray ON stray;
CREATE TRIGGER stray BEFORE INSERT ON stray FOR EACH ROW EXECUTE FUNCTION softmobile.capture();
SELECT * FROM failure('INSERT INTO stray VALUES (1)') \gx
DROP TABLE stray;
SELECT * FROM failure('SELECT softmobile.capture()') \gx

-- dropped tables: forgotten, their events kept
DROP TABLE sale, till;
SELECT relation FROM softmobile.captured_table ORDER BY 1;
SELECT entity, count(*) FROM events GROUP BY 1 ORDER BY 1;
CREATE TABLE sale (id integer PRIMARY KEY);
SELECT softmobile.attach('sale', 'sale');
INSERT INTO sale VALUES (1);
SELECT op, id, payload FROM fresh();
SET client_min_messages = warning;
DROP SCHEMA shop CASCADE;
SELECT count(*) FROM softmobile.captured_table;
