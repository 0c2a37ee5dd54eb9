-- The application's own triggers may change the row, change it again, or refuse it.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
CREATE TABLE item (id integer PRIMARY KEY, grp integer, v text, n integer DEFAULT 0, twice integer GENERATED ALWAYS AS (n * 2) STORED);
SELECT softmobile.attach('item', 'sale');

-- BEFORE triggers: what they make of the row is captured; what they drop is not
CREATE FUNCTION before_item() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF new.v = 'skip' THEN
		RETURN NULL;
	ELSIF new.v = 'refuse' THEN
		RAISE 'refused by the application' USING ERRCODE = 'ZZ001';
	END IF;
	new.v := upper(new.v);
	RETURN new;
END
$$;
CREATE TRIGGER before_item BEFORE INSERT OR UPDATE ON item FOR EACH ROW EXECUTE FUNCTION before_item();
INSERT INTO item VALUES (1, 1, 'a'), (2, 1, 'skip'), (3, 1, 'c');
INSERT INTO item VALUES (4, 1, 'refuse');
UPDATE item SET v = 'skip' WHERE id = 1;
UPDATE item SET n = 5 WHERE id = 3;
SELECT op, id, payload FROM fresh();

-- a trigger that sets the reason
CREATE FUNCTION give_reason() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM softmobile.set_reason('set by a trigger');
	RETURN new;
END
$$;
CREATE TRIGGER give_reason BEFORE UPDATE ON item FOR EACH ROW EXECUTE FUNCTION give_reason();
UPDATE item SET n = 6 WHERE id = 3;
SELECT op, id, reason FROM fresh();
DROP TRIGGER give_reason ON item;

-- AFTER triggers that change the same row: the events stand in the order of the changes, whatever the trigger is called
CREATE FUNCTION after_item() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF pg_trigger_depth() = 1 THEN
		UPDATE item SET n = n + 1 WHERE id = new.id;
	END IF;
	RETURN NULL;
END
$$;
CREATE TRIGGER "A first" AFTER INSERT OR UPDATE ON item FOR EACH ROW EXECUTE FUNCTION after_item();
INSERT INTO item VALUES (10, 2, 'x'), (11, 2, 'y');
SELECT op, id, payload FROM fresh();
UPDATE item SET v = 'z' WHERE id = 10;
SELECT op, id, payload FROM fresh();
DROP TRIGGER "A first" ON item;

-- AFTER triggers that change other rows of the same statement, whose own events are still to come: the newest state stands last
CREATE FUNCTION after_group() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF pg_trigger_depth() = 1 THEN
		UPDATE item SET n = n + 1 WHERE grp = new.grp AND id > new.id;
	END IF;
	RETURN NULL;
END
$$;
CREATE TRIGGER after_group AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION after_group();
INSERT INTO item VALUES (20, 3, 'x'), (21, 3, 'y'), (22, 3, 'z');
SELECT op, id, payload FROM fresh();
SELECT i.id, (SELECT e.payload -> 'new' ->> 'n' FROM events e WHERE e.id = i.id::text ORDER BY place DESC LIMIT 1)::integer = i.n AS newest_stands_last
FROM item i WHERE grp = 3 ORDER BY id;
DROP TRIGGER after_group ON item;
-- the same with rows that the trigger deletes, and with a savepoint that takes it back
CREATE FUNCTION after_thin() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF new.v = 'THIN' THEN
		DELETE FROM item WHERE grp = new.grp AND id > new.id;
	ELSIF new.v = 'TRY' THEN
		BEGIN
			DELETE FROM item WHERE grp = new.grp AND id > new.id;
			RAISE 'no';
		EXCEPTION WHEN raise_exception THEN
		END;
	END IF;
	RETURN NULL;
END
$$;
CREATE TRIGGER after_thin AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION after_thin();
INSERT INTO item VALUES (30, 4, 'thin'), (31, 4, 'y');
INSERT INTO item VALUES (40, 5, 'try'), (41, 5, 'y');
SELECT op, id FROM fresh();
DROP TRIGGER after_thin ON item;

-- a BEFORE trigger that makes room for the new row
CREATE FUNCTION make_room() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	DELETE FROM item WHERE id = new.id;
	RETURN new;
END
$$;
CREATE TRIGGER make_room BEFORE INSERT ON item FOR EACH ROW EXECUTE FUNCTION make_room();
INSERT INTO item VALUES (40, 6, 'instead');
SELECT op, id, payload FROM fresh();
DROP TRIGGER make_room ON item;

-- an AFTER trigger that refuses, and one that is deferred
CREATE FUNCTION after_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF new.v = 'LATE' THEN
		UPDATE item SET v = 'changed at commit' WHERE id = new.id;
	ELSIF new.v = 'NEVER' THEN
		RAISE 'refused at the end' USING ERRCODE = 'ZZ001';
	END IF;
	RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER after_refuse AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION after_refuse();
INSERT INTO item VALUES (50, 7, 'never');
BEGIN;
INSERT INTO item VALUES (51, 7, 'late');
UPDATE item SET n = 9 WHERE id = 51;
COMMIT;
SELECT op, id, payload FROM fresh();
DROP TRIGGER after_refuse ON item;

-- deferred foreign keys and unique constraints
CREATE TABLE head (id integer PRIMARY KEY);
CREATE TABLE tail (id integer PRIMARY KEY, head integer REFERENCES head DEFERRABLE INITIALLY DEFERRED, pos integer UNIQUE DEFERRABLE INITIALLY DEFERRED);
SELECT softmobile.attach('head', 'purchase'), softmobile.attach('tail', 'purchase_line');
BEGIN;
INSERT INTO tail VALUES (1, 1, 1), (2, 1, 1);
UPDATE tail SET pos = 2 WHERE id = 2;
INSERT INTO head VALUES (1);
COMMIT;
BEGIN;
INSERT INTO tail VALUES (3, 99, 3);
COMMIT;
SELECT op, entity, id FROM fresh();

-- a type whose cast to json changes an attached table itself
CREATE TYPE loud AS ENUM ('yes');
CREATE TABLE loud_log (n serial PRIMARY KEY);
CREATE FUNCTION loud_json(loud) RETURNS json LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO shop.loud_log DEFAULT VALUES;
	RETURN '"loud"';
END
$$;
CREATE CAST (loud AS json) WITH FUNCTION loud_json(loud);
CREATE TABLE loud_item (id integer PRIMARY KEY, first text, l loud, last text);
SELECT softmobile.attach('loud_item', 'loud_item'), softmobile.attach('loud_log', 'loud_log');
INSERT INTO loud_item VALUES (1, repeat('a', 50), 'yes', repeat('b', 50)), (2, 'c', 'yes', 'd');
SELECT op, entity, id, payload FROM fresh();
