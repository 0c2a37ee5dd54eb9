-- Where the reason of a change comes from, which one wins, and what is no reason.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
CREATE TABLE sale (id serial PRIMARY KEY, why text);
SELECT softmobile.attach('sale', 'sale', reason_column => 'why');
CREATE TABLE plain (id serial PRIMARY KEY);
SELECT softmobile.attach('plain', 'sale');
CREATE TABLE lax (id serial PRIMARY KEY, why text);
SELECT softmobile.attach('lax', 'sale', require_reason => false, reason_column => 'why');

-- none
SELECT softmobile.current_reason() IS NULL AS none;
SELECT * FROM failure('INSERT INTO plain DEFAULT VALUES') \gx
INSERT INTO plain DEFAULT VALUES;
SELECT * FROM failure('INSERT INTO sale DEFAULT VALUES') \gx
SELECT count(*) FROM plain;
INSERT INTO lax DEFAULT VALUES;
SELECT op, reason FROM fresh();

-- too short, counted in characters after trimming; blank counts as none
CREATE FUNCTION tried(reason text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM set_config('softmobile.reason', tried.reason, true);
	INSERT INTO shop.plain DEFAULT VALUES;
	RETURN (SELECT format('accepted: [%s]', e.reason) FROM shop.events e ORDER BY place DESC LIMIT 1);
EXCEPTION WHEN OTHERS THEN
	RETURN SQLSTATE || ': ' || SQLERRM;
END
$$;
SELECT n, tried(r) FROM (VALUES
	(1, ''), (2, '    '), (3, 'four'), (4, '  four   '), (5, 'fiver'), (6, E' \t\n fiver \r\n'), (7, 'a b c'),
	(8, 'ñáéí'), (9, 'ñáéíó'), (10, '日本語四'), (11, '日本語四五'), (12, '😀😀😀😀'), (13, '😀😀😀😀😀'),
	-- white space beyond ASCII: no-break, en quad, ideographic, line separator, zero width, byte order mark
	(14, U&'\00a0\2000\3000\2028fiver\00a0\202f\205f'), (15, U&'\200bfour\feff'), (16, U&'\1680\2029\0085'),
	(17, 'a' || E'\n' || 'bcde'), (18, E'abcde\x7f'), (19, U&'abc\0085defg')) AS v (n, r) ORDER BY n;
SELECT n, left(tried(r), 24) AS tried, length(tried(r)) FROM (VALUES (1, repeat('x', 2000)), (2, repeat('x', 2001)), (3, '  ' || repeat('x', 1999) || '   '),
	(4, repeat('ñ', 1000)), (5, repeat('ñ', 1001))) AS v (n, r) ORDER BY n;
SELECT count(*) FROM fresh();

-- set_reason(): for the rest of the transaction, with its own errors
SELECT * FROM failure('SELECT softmobile.set_reason(NULL)') \gx
SELECT * FROM failure($$SELECT softmobile.set_reason('  abc ')$$) \gx
SELECT * FROM failure($$SELECT softmobile.set_reason(E'with\nline')$$) \gx
SELECT * FROM failure($$SELECT softmobile.set_reason(repeat('x', 2001))$$) \gx
SELECT * FROM failure($$SET softmobile.reason = E'with\nline'$$) \gx
BEGIN;
SELECT softmobile.set_reason(U&'\3000 by function  ');
INSERT INTO plain DEFAULT VALUES;
SELECT softmobile.current_reason();
COMMIT;
SELECT softmobile.current_reason() IS NULL AS gone;
SELECT message FROM failure('INSERT INTO plain DEFAULT VALUES');
SELECT op, '[' || reason || ']' AS reason FROM fresh();
-- in a savepoint that is rolled back
BEGIN;
SELECT softmobile.set_reason('before savepoint');
SAVEPOINT s;
SELECT softmobile.set_reason('in savepoint');
INSERT INTO plain DEFAULT VALUES;
ROLLBACK TO s;
INSERT INTO plain DEFAULT VALUES;
SAVEPOINT t;
SELECT softmobile.set_reason('kept savepoint');
RELEASE t;
INSERT INTO plain DEFAULT VALUES;
COMMIT;
SELECT reason FROM fresh();

-- which wins: this transaction's, the header, the row's, the session's
\set headers '{"host":"pos-1","x-reason":"from header"}'
SET softmobile.reason = 'from session';
INSERT INTO sale (why) VALUES (NULL), ('from the row'), ('   '), ('');
BEGIN;
SELECT set_config('request.headers', :'headers', true) \g /dev/null
INSERT INTO sale (why) VALUES (NULL), ('from the row');
SET LOCAL softmobile.reason = 'from transaction';
INSERT INTO sale (why) VALUES (NULL), ('from the row');
-- blank: falls through
SET LOCAL softmobile.reason = '   ';
INSERT INTO sale (why) VALUES (NULL), ('from the row');
SELECT set_config('request.headers', '{"x-reason":"  "}', true) \g /dev/null
INSERT INTO sale (why) VALUES ('from the row');
COMMIT;
-- after the transaction PostgREST's setting is an empty text
SELECT current_setting('request.headers') = '' AS empty;
INSERT INTO sale (why) VALUES (NULL);
SELECT coalesce(payload -> 'new' ->> 'why', 'NULL') AS why, reason FROM fresh();
RESET softmobile.reason;
-- a blank one hides the session's only while it lasts
SET softmobile.reason = 'from session';
BEGIN;
SET LOCAL softmobile.reason = '';
SELECT message FROM failure('INSERT INTO plain DEFAULT VALUES');
COMMIT;
INSERT INTO plain DEFAULT VALUES;
-- SET within a transaction lasts beyond it and so is the session's; it ends with a rollback
BEGIN;
SET softmobile.reason = 'set in transaction';
SELECT set_config('request.headers', :'headers', true) \g /dev/null
INSERT INTO plain DEFAULT VALUES;
ROLLBACK;
SHOW softmobile.reason;
SELECT reason FROM fresh();
-- SET LOCAL over SET, in one transaction
BEGIN;
SET softmobile.reason = 'set in transaction';
SET LOCAL softmobile.reason = 'set local over it';
SELECT set_config('request.headers', :'headers', true) \g /dev/null
INSERT INTO plain DEFAULT VALUES;
COMMIT;
INSERT INTO plain DEFAULT VALUES;
SELECT reason FROM fresh();
RESET softmobile.reason;

-- headers: any JSON, or none
CREATE FUNCTION with_headers(headers text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM set_config('request.headers', headers, true);
	RETURN coalesce(softmobile.current_reason(), 'NULL');
END
$$;
SELECT h, with_headers(h) FROM (VALUES ('{"x-reason":"plain text"}'), ('{"x-reason":"\u00f1and\u00fa \ud83d\ude00"}'), ('{"x-reason":null}'), ('{"x-reason":12345}'),
	('{"X-Reason":"not lower case"}'), ('{}'), ('[]'), ('"x-reason"'), ('null'), ('{broken'), ('{"x-reason":"a\u0000bcdef"}'), ('{"x-reason":"\ud83d alone"}'),
	('{"x-reason":"first one","x-reason":"the last"}')) AS v (h);
BEGIN;
SELECT set_config('request.headers', '{"x-reason":"abc"}', true) \g /dev/null
SELECT * FROM failure('INSERT INTO plain DEFAULT VALUES') \gx
SELECT set_config('request.headers', '{"x-reason":"with\nline"}', true) \g /dev/null
SELECT * FROM failure('INSERT INTO plain DEFAULT VALUES') \gx
INSERT INTO lax DEFAULT VALUES;
COMMIT;
SELECT reason FROM fresh();

-- where no reason is required, one is kept all the same, however short; what cannot be one is left out
INSERT INTO lax (why) VALUES ('x'), ('from the row'), (E'no\nreason'), (repeat('x', 2001));
SELECT payload -> 'new' ->> 'id' AS id, reason FROM fresh();
-- where it is, a row's own must do
SELECT * FROM failure($$INSERT INTO sale (why) VALUES ('abc')$$) \gx
SELECT detail FROM failure($$INSERT INTO sale (why) VALUES (E'with\ttab')$$);

-- DELETE and key changes need one too; an update that moves a row takes the new row's
BEGIN;
SELECT softmobile.set_reason('setting up');
INSERT INTO sale (id, why) VALUES (100, 'as inserted');
COMMIT;
UPDATE sale SET why = 'as updated' WHERE id = 100;
UPDATE sale SET id = 101, why = 'as moved' WHERE id = 100;
DELETE FROM sale WHERE id = 101;
SELECT op, id, reason FROM fresh();

-- of a function, a role, a database
CREATE FUNCTION sell() RETURNS void LANGUAGE sql SET softmobile.reason = 'set for a function' AS 'INSERT INTO shop.plain DEFAULT VALUES';
SELECT sell();
SET softmobile.reason = 'from session';
BEGIN;
SET LOCAL softmobile.reason = 'from transaction';
SELECT sell();
INSERT INTO plain DEFAULT VALUES;
COMMIT;
SELECT softmobile.current_reason();
RESET softmobile.reason;
SELECT reason FROM fresh();
SELECT current_database() AS db \gset
ALTER DATABASE :"db" SET softmobile.reason = 'of the database';
\c -
SET search_path = shop;
INSERT INTO plain DEFAULT VALUES;
ALTER ROLE CURRENT_USER IN DATABASE :"db" SET softmobile.reason = 'of the role';
\c -
SET search_path = shop;
INSERT INTO plain DEFAULT VALUES;
SELECT reason FROM fresh();
ALTER ROLE CURRENT_USER IN DATABASE :"db" RESET softmobile.reason;
ALTER DATABASE :"db" RESET softmobile.reason;

-- everybody may call the two
\c -
SET search_path = shop;
CREATE ROLE regress_clerk;
GRANT USAGE ON SCHEMA shop TO regress_clerk;
GRANT ALL ON plain, plain_id_seq TO regress_clerk;
BEGIN;
SET LOCAL ROLE regress_clerk;
SELECT softmobile.set_reason('by the clerk');
SELECT softmobile.current_reason();
INSERT INTO plain DEFAULT VALUES;
COMMIT;
SELECT actor, reason FROM fresh();
DROP OWNED BY regress_clerk;
DROP ROLE regress_clerk;

-- nothing leaks from a transaction that failed
BEGIN;
SELECT softmobile.set_reason('of a failed one');
SELECT 1 / 0;
ROLLBACK;
SELECT softmobile.current_reason() IS NULL AS none;
BEGIN;
SELECT softmobile.set_reason('of a prepared one');
PREPARE TRANSACTION 'regress_reason';
SELECT softmobile.current_reason() IS NULL AS none;
ROLLBACK PREPARED 'regress_reason';
