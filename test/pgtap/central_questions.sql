-- Headquarters' answers: verify, reconcile, reference data.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();
SELECT setseed(0.42);

CREATE TABLE tok (name text PRIMARY KEY, hash bytea);
INSERT INTO tok VALUES
	('both', sha256(convert_to(softmobile.central_create_token('{b1,"Ñuñoa 2"}', 'server of two'), 'UTF8'))),
	('b2', sha256(convert_to(softmobile.central_create_token('{b2}', 'server 2'), 'UTF8'))),
	('revoked', sha256(convert_to(softmobile.central_create_token('{b1}', 'revoked'), 'UTF8')));
SELECT softmobile.central_revoke_token('revoked') \g /dev/null

-- n-th well-known id
CREATE FUNCTION u(n int) RETURNS uuid LANGUAGE sql RETURN ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid;
CREATE FUNCTION e1() RETURNS uuid LANGUAGE sql RETURN '00000000-0000-4000-8000-000000000001'::uuid;

-- An event, its id that of its number unless told.
CREATE FUNCTION ev(seq int, entity text, data text DEFAULT '{"new":{"n":1}}', op text DEFAULT 'insert', lane text DEFAULT 'high', id int DEFAULT NULL, branch text DEFAULT 'b1') RETURNS text
LANGUAGE sql RETURN format('{"specversion":"1.0","id":"%s","source":"/branches/%s","type":"softmobile.item.%s","subject":%s,"time":"2025-11-24T08:00:00Z","sequence":"%s","lane":"%s","epoch":"%s","epochno":"10","reason":"Venta en tienda","actor":"pos","data":%s}',
	u(coalesce(id, seq)), branch, op, to_json(entity), seq, lane, e1(), data);
CREATE FUNCTION post(VARIADIC events text[]) RETURNS text
LANGUAGE sql RETURN softmobile.central_receive('[' || array_to_string(events, ',') || ']', (SELECT hash FROM tok WHERE name = CASE WHEN events[1] LIKE '%/branches/b2%' THEN 'b2' ELSE 'both' END))::json ->> 'accepted';

CREATE FUNCTION verify(lanes text DEFAULT '[]', contents jsonb DEFAULT '[]', events jsonb DEFAULT '[]', branch text DEFAULT 'b1') RETURNS jsonb
LANGUAGE sql RETURN softmobile.central_verify(format('{"branch":%s,"lanes":%s,"contents":%s,"events":%s}', to_json(branch), lanes, contents, events), (SELECT hash FROM tok WHERE name = 'both'))::jsonb;
CREATE FUNCTION lane(highest bigint, void text DEFAULT '{}', name text DEFAULT 'high', epoch uuid DEFAULT e1(), epoch_no int DEFAULT 10) RETURNS text
LANGUAGE sql RETURN format('{"epoch":"%s","epoch_no":%s,"lane":"%s","highest":%s,"void":"%s"}', epoch, epoch_no, name, highest, void);
CREATE FUNCTION block(low bigint, high bigint, members text DEFAULT '{}', digest text DEFAULT repeat('0', 64), lane text DEFAULT 'high', first int DEFAULT 0, last int DEFAULT 999999) RETURNS jsonb
LANGUAGE sql RETURN jsonb_build_object('epoch', e1(), 'lane', lane, 'from', low, 'to', high, 'first_id', u(first), 'last_id', u(last), 'members', members, 'digest', digest);
-- What a branch computes that has exactly these events of b1's lane.
CREATE FUNCTION block_digest(low bigint, high bigint, lane text DEFAULT 'high') RETURNS text
LANGUAGE sql RETURN (SELECT encode(sha256(coalesce(string_agg(encode(substr(sha256(convert_to(concat_ws(E'\n', i.id, i.entity_type, i.entity_id, i.op, i.actor, i.reason, i.data), 'UTF8')), 1, 16), 'hex'), '' ORDER BY i.seq, i.id), '')::bytea), 'hex')
	FROM softmobile.central_inbox i WHERE i.branch_id = 'b1' AND i.epoch = e1() AND i.lane = block_digest.lane AND i.seq >= low AND i.seq < high);

-- SQLSTATE and message of a refusal.
CREATE FUNCTION refusal(question text, body text, holder text DEFAULT 'both') RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	token bytea := (SELECT hash FROM tok WHERE name = holder);
BEGIN
	IF question = 'verify' THEN
		PERFORM softmobile.central_verify(body, token);
	ELSE
		PERFORM softmobile.central_reconcile(body, token);
	END IF;
	RETURN 'none';
EXCEPTION WHEN OTHERS THEN
	RETURN SQLSTATE || ': ' || SQLERRM;
END $$;

/* The digests are fixed: other implementers compute them, too. */
SELECT is(softmobile.event_digest(u(1), 'item', 'Ñ 1', 'update', NULL, 'Devolución', E'{"new": {"a":1.50},\n"old":{}}'), 'd4a167bf258d8202172f2a2a6f7eb80d', 'digest of an event');
SELECT is(softmobile.event_digest(u(1), 'item', 'A', 'insert', 'pos', NULL, '{"new":{"n":1}}'), '5f1599e7a47a7ce01a068068c77a8e36', 'the example of the documentation');
SELECT is(softmobile.reconcile_bucket('Ñ 1', 4096), 2081, 'bucket of a row');
SELECT is(softmobile.reconcile_bucket('Ñ 1', 7), 1, 'whatever their number');
SELECT is(softmobile.reconcile_bucket('2', 4096), 3642, 'the first bytes are no negative number');
SELECT is(softmobile.reconcile_digest('Ñ 1', 'A-1', NULL, ''), 7409246829061528057, 'digest of a row');
SELECT is(softmobile.reconcile_digest('Ñ 1', VARIADIC '{}'), -7298285362938899344, 'without any value');

/* Verify: numbers. */
SELECT is(verify(), '{"branch":"b1","lanes":[],"contents":[],"events":[]}', 'a branch that has never sent');
SELECT is(post(ev(1, 'A'), ev(2, 'B'), ev(4, 'Ñ', E'{"new" : {"n":1.50, "t":"\\u00f1"}}'), ev(5, 'A', '{"new":{"n":2},"old":{"n":1}}', 'update')), '4', 'it sends, and a number is void');
SELECT is(verify(format('[%s]', lane(5, '{[3,4)}'))) -> 'lanes',
	jsonb_build_array(jsonb_build_object('epoch', e1(), 'epoch_no', 10, 'lane', 'high', 'highest', 5, 'received', '{[1,3),[4,6)}', 'void', '{[3,4)}', 'forks', 0)), 'void numbers are noted');
SELECT is((SELECT missing FROM softmobile.central_lanes WHERE branch_id = 'b1'), '{}', 'so that nothing is missing');
CREATE TABLE before AS SELECT ctid AS place FROM softmobile.central_span WHERE void;
SELECT is(verify(format('[%s]', lane(5, '{[3,4)}'))) #>> '{lanes,0,void}', '{[3,4)}', 'what is known');
SELECT results_eq('SELECT ctid FROM softmobile.central_span WHERE void', 'SELECT place FROM before', 'is not written again');
SELECT is((SELECT count(*)::int FROM softmobile.central_span WHERE void), 1, 'it is one row');
SELECT is(verify(format('[%s,%s]', lane(0, name => 'low'), lane(7, '{[1,8)}', 'normal', u(7), 11))) -> 'lanes',
	jsonb_build_array(
		jsonb_build_object('epoch', e1(), 'epoch_no', 10, 'lane', 'high', 'highest', 5, 'received', '{[1,3),[4,6)}', 'void', '{[3,4)}', 'forks', 0),
		jsonb_build_object('epoch', e1(), 'epoch_no', 10, 'lane', 'low', 'highest', 0, 'received', '{}', 'void', '{}', 'forks', 0),
		jsonb_build_object('epoch', u(7), 'epoch_no', 11, 'lane', 'normal', 'highest', 0, 'received', '{}', 'void', '{[1,8)}', 'forks', 0)), 'lanes from which nothing has come; all lanes of the branch are in the answer');
SELECT is((SELECT string_agg(missing::text, ' ') FROM softmobile.central_lanes WHERE highest_seq = 0), '{} {}', 'nothing is missing in them');
SELECT is((SELECT events FROM softmobile.central_status WHERE branch_id = 'b1'), 4::bigint, 'central_status is not disturbed by them');
SELECT is(post(ev(1, 'low', lane => 'low', id => 101)), '1', 'and then something comes');
SELECT is((SELECT (highest_seq, events, last_received_at IS NOT NULL)::text FROM softmobile.central_lanes WHERE lane = 'low'), '(1,1,t)', 'as into any other lane');
SELECT is(verify('[]', branch => 'Ñuñoa 2'), '{"branch":"Ñuñoa 2","lanes":[],"contents":[],"events":[]}', 'another branch sees nothing of them');
SELECT is(verify(format('[%s]', lane(4, '{[1,3),[2,4)}'))) #>> '{lanes,0,void}', '{[1,4)}', 'ranges may overlap');
SELECT is((SELECT (received * void)::text FROM softmobile.central_lanes WHERE lane = 'high'), '{[1,3)}', 'what is received and void at once is shown as it is');
SELECT isnt((SELECT last_seen FROM softmobile.central_branch WHERE branch_id = 'Ñuñoa 2'), NULL, 'a branch that verifies has been heard of');
SELECT is(verify(format('[%s]', lane(9223372036854775806, '{[9223372036854775806,9223372036854775807)}', epoch => u(8)))) #>> '{lanes,2,void}', '{[9223372036854775806,9223372036854775807)}', 'the largest number');

-- central_declare_void() against multirange union
CREATE TABLE drawn AS SELECT n, int8multirange(int8range(a, a + (random() * 8)::int, '[]'), int8range(b, b + (random() * 40)::int, '[]')) AS r
	FROM (SELECT n, (random() * 900)::int + 1 AS a, (random() * 900)::int + 1 AS b FROM generate_series(1, 100) n) x;
SELECT verify(format('[%s]', lane(10000, r::text, 'normal'))) FROM drawn ORDER BY n \g /dev/null
SELECT is((SELECT void FROM softmobile.central_lanes WHERE epoch = e1() AND lane = 'normal'), (SELECT range_agg(r) FROM (SELECT unnest(r) AS r FROM drawn) x), 'void numbers declared in any order are the union');
SELECT is((SELECT count(*) FROM softmobile.central_span WHERE epoch = e1() AND lane = 'normal'), (SELECT count(*) FROM unnest((SELECT range_agg(r) FROM (SELECT unnest(r) AS r FROM drawn) x))), 'in as few ranges as can be');
SAVEPOINT few;
SELECT is(length(verify(format('[%s]', lane(1000000, '{' || (SELECT string_agg(format('[%s,%s)', 4 * n, 4 * n + 1), ',') FROM generate_series(1, 50000) n) || '}', 'low'))) #>> '{lanes,1,void}'),
	(SELECT sum(length(format('[%s,%s),', 4 * n, 4 * n + 1)))::int + 1 FROM generate_series(1, 50000) n), 'fifty thousand of them');
ROLLBACK TO few;

/* Verify: contents. */
SELECT is(verify(contents => jsonb_build_array(block(1, 4097, '{[1,3),[4,6)}', block_digest(1, 4097)))) -> 'contents', '[]', 'a block that is the same here and there is not in the answer');
SELECT is(verify(contents => jsonb_build_array(block(6, 100, '{}', encode(sha256(''), 'hex')))) -> 'contents', '[]', 'an empty one');
SELECT is(verify(contents => jsonb_build_array(block(1, 6, '{[1,6)}', block_digest(1, 6)), block(1, 3, '{[1,3)}', block_digest(1, 3)), block(2, 5, '{[2,3),[4,5)}'))) -> 'contents',
	jsonb_build_array(jsonb_build_object('epoch', e1(), 'lane', 'high', 'from', 1, 'to', 6, 'members', '{[1,3),[4,6)}', 'digest', block_digest(1, 6)),
		jsonb_build_object('epoch', e1(), 'lane', 'high', 'from', 2, 'to', 5, 'members', '{[2,3),[4,5)}', 'digest', block_digest(2, 5))),
	'other members, or another digest: the answer says what is here');
SELECT is(verify(contents => jsonb_build_array(block(1, 6, '{[2,3),[4,5)}', block_digest(2, 5), first => 2, last => 4))) -> 'contents', '[]', 'only between the lowest and highest id is looked');
SELECT is(verify(contents => jsonb_build_array(block(1, 2, '{[1,2)}', block_digest(1, 2, 'low'), 'low'))) -> 'contents', '[]', 'lanes are apart');
SELECT is(post(ev(2, 'B', id => 2, branch => 'b2'), ev(3, 'B', id => 3, branch => 'b2')), '2', 'another branch with the same epoch, numbers and ids');
SELECT is(verify(contents => jsonb_build_array(block(1, 6, '{[1,3),[4,6)}', block_digest(1, 6)))) -> 'contents', '[]', 'branches are apart');
SELECT is(post(replace(ev(2, 'B', id => 102), e1()::text, u(9)::text)), '1', 'another epoch with the same numbers');
SELECT is(verify(events => jsonb_build_array(block(2, 3))) #> '{events,0,ids}', jsonb_build_array(u(2)), 'epochs are apart');

SAVEPOINT whole;
UPDATE softmobile.central_inbox SET reason = 'Venta en tiendA' WHERE branch_id = 'b1' AND id = u(2);
SELECT is(verify(contents => jsonb_build_array(block(1, 6, '{[1,3),[4,6)}', block_digest(1, 6)))) -> 'contents', '[]', 'block_digest() sees what central has');
ROLLBACK TO whole;
CREATE FUNCTION spoiled(change text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	asked jsonb := jsonb_build_array(block(1, 6, '{[1,3),[4,6)}', block_digest(1, 6)));
BEGIN
	EXECUTE 'UPDATE softmobile.central_inbox SET ' || change || ' WHERE branch_id = ''b1'' AND id = u(2)';
	RETURN verify(contents => asked) #>> '{contents,0,members}';
END $$;
SELECT is(spoiled(c), '{[1,3),[4,6)}', 'a change of ' || c || ' is seen')
FROM unnest('{"actor = ''pos2''","reason = NULL","entity_id = ''B2''","entity_type = ''items''","op = ''update''","data = ''{\"new\": {\"n\":1}}''","id = u(3)"}'::text[]) AS c;
ROLLBACK TO whole;
DELETE FROM softmobile.central_inbox WHERE branch_id = 'b1' AND id = u(2);
SELECT is(verify(contents => jsonb_build_array(block(1, 6, '{[1,3),[4,6)}'))) #>> '{contents,0,members}', '{[1,2),[4,6)}', 'an event that the inbox has lost is no member');
SELECT is(verify() #>> '{lanes,0,received}', '{[1,3),[4,6)}', 'though its number was received');
ROLLBACK TO whole;

SELECT is(verify(events => jsonb_build_array(block(2, 6), block(2, 6, first => 5), block(50, 60))) -> 'events',
	jsonb_build_array(jsonb_build_object('epoch', e1(), 'lane', 'high', 'from', 2, 'to', 6, 'ids', jsonb_build_array(u(2), u(4), u(5)), 'seqs', '[2,4,5]'::jsonb, 'digests',
			jsonb_build_array(softmobile.event_digest(u(2), 'item', 'B', 'insert', 'pos', 'Venta en tienda', '{"new":{"n":1}}'),
				softmobile.event_digest(u(4), 'item', 'Ñ', 'insert', 'pos', 'Venta en tienda', E'{"new" : {"n":1.50, "t":"\\u00f1"}}'),
				softmobile.event_digest(u(5), 'item', 'A', 'update', 'pos', 'Venta en tienda', '{"new":{"n":2},"old":{"n":1}}'))),
		jsonb_build_object('epoch', e1(), 'lane', 'high', 'from', 2, 'to', 6, 'ids', jsonb_build_array(u(5)), 'seqs', '[5]'::jsonb, 'digests',
			jsonb_build_array(softmobile.event_digest(u(5), 'item', 'A', 'update', 'pos', 'Venta en tienda', '{"new":{"n":2},"old":{"n":1}}'))),
		jsonb_build_object('epoch', e1(), 'lane', 'high', 'from', 50, 'to', 60, 'ids', '[]'::jsonb, 'seqs', '[]'::jsonb, 'digests', '[]'::jsonb)),
	'each event''s digest, its data byte for byte');
SET LOCAL client_min_messages = error;
SELECT is(post(ev(4, 'fork', id => 3)), '1', 'a number used twice');
SELECT is(post(ev(2, 'fork', id => 4, branch => 'b2'), ev(2, 'fork', id => 5, branch => 'b2')), '2', 'others by another branch');
RESET client_min_messages;
SELECT is(verify(events => jsonb_build_array(block(4, 6))) #> '{events,0,ids}', jsonb_build_array(u(3), u(4), u(5)), 'both events are shown, by number and id');
SELECT is(verify() #>> '{lanes,0,forks}', '1', 'and counted as a fork');
SELECT is(verify(contents => jsonb_build_array(block(1, 6, '{[1,3),[4,6)}', block_digest(1, 6)))) -> 'contents', '[]', 'a block has the digests of both');
SELECT is(jsonb_array_length(verify(contents => (SELECT jsonb_agg(block(n * 4096 + 1, n * 4096 + 4097)) FROM generate_series(0, 255) n)) -> 'contents'), 256, 'as many blocks as are allowed');

/* Verify: refusals. */
CREATE FUNCTION bad_lane(patch jsonb) RETURNS text
LANGUAGE sql RETURN refusal('verify', jsonb_build_object('branch', 'b1', 'lanes', jsonb_build_array(lane(9)::jsonb || patch))::text);
CREATE FUNCTION bad_block(patch jsonb, key text DEFAULT 'contents') RETURNS text
LANGUAGE sql RETURN refusal('verify', jsonb_build_object('branch', 'b1', key, jsonb_build_array(block(1, 2) || patch))::text);
SELECT is(bad_lane('{}'), 'none', 'a lane as it should be');
SELECT is(bad_block('{}', key), 'none', 'a block as it should be, in ' || key) FROM unnest('{contents,events}'::text[]) AS key;
SELECT is(bad_block('{"members":null,"digest":null}', 'events'), 'none', 'which needs no members and no digest in events');
SELECT matches(bad_lane(patch), '^SM422: ' || why || '.*', left(patch::text, 60)) FROM (VALUES
	('{"epoch":null}'::jsonb, 'an object of "lanes" cannot be used: epoch must be a UUID'),
	('{"epoch":"x"}', 'the question cannot be understood: invalid input syntax for type uuid'),
	('{"epoch":["x"]}', 'the question cannot be understood: invalid input syntax for type uuid'),
	('{"epoch_no":null}', 'an object of "lanes" cannot be used: epoch_no'),
	('{"epoch_no":0}', 'an object of "lanes" cannot be used: epoch_no'),
	('{"epoch_no":2147483648}', 'the question cannot be understood: value "2147483648" is out of range'),
	('{"epoch_no":1e400}', 'the question cannot be understood: value "1000'),
	('{"lane":"urgent"}', 'an object of "lanes" cannot be used: lane must be'),
	('{"lane":null}', 'an object of "lanes" cannot be used: lane must be'),
	('{"highest":null}', 'an object of "lanes" cannot be used: highest'),
	('{"highest":-1}', 'an object of "lanes" cannot be used: highest'),
	('{"highest":9223372036854775807}', 'an object of "lanes" cannot be used: highest'),
	('{"highest":9223372036854775808}', 'the question cannot be understood: value "9223372036854775808" is out of range'),
	('{"highest":1.5}', 'the question cannot be understood: invalid input syntax for type bigint'),
	('{"void":"{[5,1)}"}', 'the question cannot be understood: range lower bound must be less'),
	('{"void":"{[1,2)"}', 'the question cannot be understood: malformed multirange'),
	('{"void":"[1,2)"}', 'the question cannot be understood: malformed multirange'),
	('{"void":""}', 'the question cannot be understood: malformed multirange'),
	('{"void":"{[a,b)}"}', 'the question cannot be understood: invalid input syntax for type bigint'),
	('{"void":"{[1,9223372036854775807]}"}', 'the question cannot be understood: bigint out of range'),
	('{"void":"{[1,99999999999999999999)}"}', 'the question cannot be understood: value "99999999999999999999" is out of range'),
	('{"void":{"a":1}}', 'the question cannot be understood: malformed multirange'),
	('{"void":"{[0,2)}"}', 'an object of "lanes" cannot be used: void numbers must lie'),
	('{"void":"{[9,11)}"}', 'an object of "lanes" cannot be used: void numbers must lie'),
	('{"void":"{(,5)}"}', 'an object of "lanes" cannot be used: void numbers must lie'),
	('{"void":"{[5,)}"}', 'an object of "lanes" cannot be used: void numbers must lie'),
	('{"highest":0,"void":"{[1,2)}"}', 'an object of "lanes" cannot be used: void numbers must lie')) AS t (patch, why);
SELECT is(length(bad_lane(jsonb_build_object('void', repeat('x', 1000000)))), length('SM422: the question cannot be understood: ') + 200, 'an error does not repeat a megabyte');
SELECT is(bad_lane('{"void":null}'), 'none', 'a lane may say nothing of void numbers');
SELECT is(verify() #>> '{lanes,0,void}', '{[1,4)}', 'and has none less for it');
SELECT matches(bad_block(patch, key), '^SM422: ' || why || '.*', key || ' ' || patch::text)
FROM (VALUES
	('{"epoch":null}'::jsonb, 'a block of "[a-z]+" cannot be used: epoch must be a UUID'),
	('{"lane":"HIGH"}', 'a block of "[a-z]+" cannot be used: lane must be'),
	('{"from":null}', 'a block of "[a-z]+" cannot be used: from must be'),
	('{"from":0}', 'a block of "[a-z]+" cannot be used: from must be'),
	('{"from":2}', 'a block of "[a-z]+" cannot be used: from must be'),
	('{"from":3}', 'a block of "[a-z]+" cannot be used: from must be'),
	('{"to":null}', 'a block of "[a-z]+" cannot be used: from must be'),
	('{"to":99999999999999999999}', 'the question cannot be understood: value "99999999999999999999" is out of range'),
	('{"first_id":null}', 'a block of "[a-z]+" cannot be used: first_id'),
	('{"last_id":null}', 'a block of "[a-z]+" cannot be used: first_id'),
	('{"first_id":"ffffffff-ffff-7fff-bfff-ffffffffffff"}', 'a block of "[a-z]+" cannot be used: first_id'),
	('{"first_id":7}', 'the question cannot be understood: invalid input syntax for type uuid'),
	('{"members":"{[5,1)}"}', 'the question cannot be understood: range lower bound must be less')) AS t (patch, why), unnest('{contents,events}'::text[]) AS key;
SELECT matches(bad_block(patch), '^SM422: a block of "contents" cannot be used: ' || why, patch::text) FROM (VALUES
	('{"members":null}'::jsonb, 'members must be'), ('{"digest":null}', 'digest must be'), ('{"digest":"abc"}', 'digest must be'),
	(jsonb_build_object('digest', repeat('A', 64)), 'digest must be'), (jsonb_build_object('digest', repeat('a', 65)), 'digest must be')) AS t (patch, why);
SELECT matches(refusal(q, body), '^' || why || '.*', q || ' ' || left(body, 60)) FROM (VALUES
	('', 'SM400: the body cannot be read as JSON'),
	('{"branch":"b1"', 'SM400: the body cannot be read as JSON'),
	('{"branch":"b1"} x', 'SM400: the body cannot be read as JSON'),
	(repeat('[', 100000), 'SM400: the body cannot be read as JSON: stack depth'),
	(repeat('{"branch":', 100000), 'SM400: the body cannot be read as JSON: stack depth'),
	('{"\u0000":1}', 'SM400: the body cannot be read as JSON: unsupported Unicode'),
	('[]', 'SM422: the question is not a JSON object'),
	('"b1"', 'SM422: the question is not a JSON object'),
	('null', 'SM422: the question is not a JSON object'),
	(NULL, 'SM422: the question is not a JSON object'),
	('{"branch":"b2","branch":"b1"}', 'SM422: a key of the question stands twice'),
	('{"branch":"b1","br\u0061nch":"b2"}', 'SM422: a key of the question stands twice'),
	('{}', 'SM422: the question names no branch'),
	('{"branch":null}', 'SM422: the question names no branch'),
	('{"branch":"\u0000"}', 'SM400: the body cannot be read as JSON: unsupported Unicode'),
	('{"branch":"\ud800"}', 'SM400: the body cannot be read as JSON'),
	('{"branch":"b2"}', 'SM403: this token may not speak for branch "b2"'),
	('{"branch":"nowhere"}', 'SM403: this token may not speak for branch "nowhere"'),
	('{"branch":""}', 'SM403: this token may not speak for branch ""'),
	('{"branch":["b1"]}', 'SM403: this token may not speak for branch "\["b1"\]"'),
	(format('{"branch":"%s"}', repeat('b', 900000)), 'SM403: this token may not speak for branch "b{100}"$')) AS t (body, why), unnest('{verify,reconcile}'::text[]) AS q;
SELECT matches(refusal('verify', format('{"branch":"b1",%s}', body)), '^' || why || '.*', left(body, 60)) FROM (VALUES
	('"lanes":7', 'SM422: "lanes" must be an array'), ('"lanes":null', 'SM422: "lanes" must be an array'), ('"lanes":{}', 'SM422: "lanes" must be an array'),
	('"lanes":[7]', 'SM422: "lanes" must be an array of objects'), ('"contents":[[]]', 'SM422: "contents" must be an array of objects'), ('"events":[null]', 'SM422: "events" must be an array of objects'),
	('"lanes":[{"lane":"high","lane":"low"}]', 'SM422: in an object of "lanes" a key stands twice'),
	('"contents":[{},{"to":1,"to":1}]', 'SM422: in an object of "contents" a key stands twice'),
	('"lanes":[{"\u0000":1}]', 'SM400: the body cannot be read as JSON: unsupported Unicode'),
	('"lanes":[{"lane":"\u0000"}]', 'SM400: the body cannot be read as JSON: unsupported Unicode'),
	(format('"lanes":[%s,%s]', lane(1), lane(2)), 'SM422: a lane stands twice'),
	(format('"events":[{"members":%s%s}]', repeat('[', 3000), repeat(']', 3000)), 'SM422: the question cannot be understood: malformed multirange'),
	('"lanes":[{}' || repeat(',{}', 1000) || ']', 'SM413: "lanes" has more than 1000 elements'),
	('"contents":[{}' || repeat(',{}', 256) || ']', 'SM413: "contents" has more than 256 elements'),
	('"events":[{}' || repeat(',{}', 256) || ']', 'SM413: "events" has more than 256 elements'),
	(format('"contents":[%s,%s]', block(1, 1048577), block(1, 2)), 'SM413: the blocks of "contents" have together more than 1048576 numbers'),
	(format('"events":[%s,%s]', block(1, 65537), block(1, 2)), 'SM413: the blocks of "events" have together more than 65536 numbers'),
	(format('"contents":[%s]', block(1, 9223372036854775807)), 'SM413: the blocks of "contents" have together more'),
	(format('"lanes":[%s]', lane(10000000, '{' || (SELECT string_agg(format('[%s,%s)', 2 * n, 2 * n + 1), ',') FROM generate_series(1, 250001) n) || '}')), 'SM413: the lanes have together more than 250000 ranges'),
	(format('"x":"%s"', repeat('x', 16777216)), 'SM413: the question has more than 16777216 bytes')) AS t (body, why);
SELECT is(refusal('verify', format('{"branch":"b1","contents":[%s]}', block(1, 1048577))), 'none', 'the largest block');
SELECT is(refusal('verify', '{"branch":"b1","lanes":[{"epoch":"00000000-0000-4000-8000-0000000000ff","epoch_no":12,"lane":"low","highest":2,"void":"{[1,2)}"}],"contents":[7]}'), 'SM422: "contents" must be an array of objects', 'what is refused');
SELECT is((SELECT count(*)::int FROM softmobile.central_lane WHERE epoch_no = 12), 0, 'leaves nothing behind');
SELECT is(refusal('verify', '{"branch":"b1","future":{"a":[1]}}'), 'none', 'what is not known yet is passed over');
SELECT is(left(refusal(q, '{"branch":"b1"}', 'revoked'), 5), 'SM401', q || ' with a revoked token') FROM unnest('{verify,reconcile}'::text[]) AS q;
SELECT is(left(refusal(q, 'garbage', 'nobody'), 5), 'SM401', q || ' without a token: no body is read') FROM unnest('{verify,reconcile}'::text[]) AS q;

/* Reconcile. */
SAVEPOINT sales;
DELETE FROM softmobile.central_projection;
INSERT INTO softmobile.central_projection (branch_id, entity_type, entity_id, seq, changed_at, epoch_no, deleted, changed_here, row)
SELECT 'b1', 'sale', n::text, n, now(), 10, false, false, jsonb_build_object('folio', 'A-' || n, 'total', n::numeric / 100, 'note', NULL,
	'sold_at', to_char('2026-01-01 00:00'::timestamp + n * interval '1 h', 'YYYY-MM-DD"T"HH24:MI:SS') || '+00:00')
FROM generate_series(0, 743) n;
INSERT INTO softmobile.central_projection VALUES
	('b1', 'sale', 'gone', 1, now(), 10, true, false, NULL), ('b1', 'note', '1', 1, now(), 10, false, false, '{"folio":"N-1"}'), ('b2', 'sale', '1', 1, now(), 10, false, false, '{"folio":"B-1"}');
-- A branch that holds these rows, and the question that it asks.
CREATE TABLE shop AS SELECT n::text AS id, 'A-' || n AS folio, (n::numeric / 100)::text AS total, NULL::text AS note, ('2026-01-01'::timestamp + n * interval '1 h') AS sold_at FROM generate_series(0, 743) n;
CREATE FUNCTION asked(buckets int DEFAULT 64, first text DEFAULT '2026-01-01', last text DEFAULT '2026-01-31', date_column text DEFAULT 'sold_at') RETURNS jsonb
LANGUAGE sql RETURN (
	SELECT jsonb_build_object('branch', 'b1', 'entity_type', 'sale', 'columns', '["folio","total","note"]'::jsonb, 'date_column', date_column, 'from', first, 'to', last, 'buckets', buckets,
		'counts', jsonb_agg(coalesce(s.n, 0) ORDER BY b), 'digests', jsonb_agg(lpad(to_hex(coalesce(s.digest, 0)), 16, '0') ORDER BY b))
	FROM generate_series(0, buckets - 1) AS b LEFT JOIN (
		SELECT softmobile.reconcile_bucket(id, buckets) AS b, count(*) AS n, bit_xor(softmobile.reconcile_digest(id, folio, total, note)) AS digest
		FROM shop WHERE date_column IS NULL OR sold_at::date BETWEEN first::date AND last::date GROUP BY 1) AS s USING (b));
CREATE FUNCTION reconcile(question jsonb) RETURNS jsonb
LANGUAGE sql RETURN softmobile.central_reconcile(question::text, (SELECT hash FROM tok WHERE name = 'both'))::jsonb;
CREATE FUNCTION rows_of(answer jsonb) RETURNS SETOF text LANGUAGE sql
AS $$SELECT r ->> 'entity_id' FROM jsonb_array_elements(answer -> 'buckets') b, jsonb_array_elements(b -> 'rows') r ORDER BY 1$$;

SELECT is(reconcile(asked(n)), '{"branch":"b1","entity_type":"sale","rows":744,"buckets":[]}', format('the same on both sides, in %s buckets', n)) FROM unnest('{1,2,7,64,4096}'::int[]) AS n;
SELECT is(reconcile(asked(16, d, d)), '{"branch":"b1","entity_type":"sale","rows":24,"buckets":[]}', 'one day: ' || d) FROM unnest('{2026-01-01,2026-01-15,2026-01-31}'::text[]) AS d;
SELECT is(reconcile(asked(16, '2026-02-01', '2026-02-28')), '{"branch":"b1","entity_type":"sale","rows":0,"buckets":[]}', 'a month without sales');
SELECT is(reconcile(asked(16, '-infinity', 'infinity', NULL) || '{"from":null,"to":null}') ->> 'rows', '744', 'without dates');
SELECT is(jsonb_array_length(reconcile(asked(1) || '{"counts":[743]}') #> '{buckets,0,rows}'), 744, 'the same digest, but another count');
SELECT is(reconcile(asked(16) || '{"entity_type":"none"}') -> 'rows', '0', 'an entity type that central does not know');
SET LOCAL timezone = 'America/Mexico_City';
SELECT is(reconcile(asked(16, '2026-01-31', '2026-01-31')) ->> 'rows', '24', 'days are those of UTC, whatever the session''s time zone');
RESET timezone;

SAVEPOINT same;
UPDATE shop SET total = '1.50' WHERE id = '17';
SELECT is(reconcile(asked(4096)) -> 'buckets', jsonb_build_array(jsonb_build_object('bucket', softmobile.reconcile_bucket('17', 4096), 'rows',
	jsonb_build_array(jsonb_build_object('entity_id', '17', 'values', '{"folio":"A-17","total":"0.17000000000000000000","note":null}'::jsonb)))), 'a value that differs: central''s row, its values as text');
SELECT ok('17' IN (SELECT rows_of(reconcile(asked(8)))), 'with few buckets others come along');
UPDATE shop SET total = (0.17::numeric(30,20))::text, folio = NULL WHERE id = '17';
SELECT results_eq('SELECT rows_of(reconcile(asked(4096)))', $$VALUES ('17')$$, 'NULL here, a value there');
UPDATE softmobile.central_projection SET row = row || '{"folio":null}' WHERE entity_id = '17' AND branch_id = 'b1';
SELECT is(reconcile(asked()) -> 'buckets', '[]', 'NULL here, null there');
UPDATE softmobile.central_projection SET row = row - 'folio' WHERE entity_id = '17' AND branch_id = 'b1';
SELECT is(reconcile(asked()) -> 'buckets', '[]', 'NULL here, no such column there');
UPDATE softmobile.central_projection SET row = row || '{"folio":""}' WHERE entity_id = '17' AND branch_id = 'b1';
SELECT results_eq('SELECT rows_of(reconcile(asked(4096)))', $$VALUES ('17')$$, 'NULL is not empty');
ROLLBACK TO same;
INSERT INTO shop VALUES ('new', 'A-744', '1', NULL, '2026-01-05');
SELECT is(reconcile(asked(4096)) -> 'buckets', jsonb_build_array(jsonb_build_object('bucket', softmobile.reconcile_bucket('new', 4096), 'rows', '[]'::jsonb)), 'a row that central has not: a bucket without rows');
ROLLBACK TO same;
DELETE FROM shop WHERE id IN ('3', '701');
SELECT results_eq('SELECT rows_of(reconcile(asked(4096)))', $$VALUES ('3'), ('701')$$, 'rows that the branch has not');
SELECT results_eq($$SELECT rows_of(reconcile(asked(4096, '2026-01-01', '2026-01-01')))$$, $$VALUES ('3')$$, 'only those of the days asked');
ROLLBACK TO same;
INSERT INTO shop SELECT 'gone', 'A-0', '0', NULL, '2026-01-05';
SELECT is(reconcile(asked(4096)) #> '{buckets,0,rows}', '[]', 'what is deleted at central is not there');
ROLLBACK TO same;
UPDATE softmobile.central_projection SET row = row || '{"sold_at":"2025-12-31T23:30:00-06:00"}' WHERE entity_id = '17' AND branch_id = 'b1';
SELECT is(reconcile(asked(16, '2026-01-01', '2026-01-01')) ->> 'buckets', '[]', 'a moment counts by its day in UTC');
UPDATE softmobile.central_projection SET row = row || '{"sold_at":"2026-01-01"}' WHERE entity_id = '17' AND branch_id = 'b1';
SELECT is(reconcile(asked(16, '2026-01-01', '2026-01-01')) ->> 'buckets', '[]', 'so does a date');
UPDATE softmobile.central_projection SET row = row || '{"sold_at":null}' WHERE entity_id = '17' AND branch_id = 'b1';
SELECT is(reconcile(asked()) ->> 'rows', '743', 'without a date it is of no day');
UPDATE softmobile.central_projection SET row = row || '{"sold_at":"soon"}' WHERE entity_id = '17' AND branch_id = 'b1';
SELECT is(refusal('reconcile', asked()::text), 'SM422: column "sold_at" of entity type "sale" holds something that is no date: invalid input syntax for type timestamp with time zone: "soon"', 'what is no date');
UPDATE softmobile.central_projection SET row = row || '{"sold_at":"2026-02-30T10:00:00"}' WHERE entity_id = '17' AND branch_id = 'b1';
SELECT matches(refusal('reconcile', asked()::text), '^SM422: column "sold_at" of entity type "sale" holds something that is no date: .*', 'nor is this');
ROLLBACK TO same;
SELECT is(reconcile(asked(1) || '{"columns":[]}') #> '{buckets,0,rows,0}', '{"entity_id":"0","values":{}}', 'no columns: only whether a row is there');
SELECT is(reconcile(asked(64) || '{"counts":"{1}","buckets":1,"digests":["0000000000000000"]}') #> '{buckets,0,bucket}', '0', 'another number of buckets');

-- Limits.
INSERT INTO softmobile.central_projection SELECT 'b1', 'mass', n::text, n, now(), 10, false, false, jsonb_build_object('n', n) FROM generate_series(1, 50000) n;
CREATE FUNCTION mass(columns text DEFAULT '["n"]') RETURNS text
LANGUAGE sql RETURN format('{"branch":"b1","entity_type":"mass","columns":%s,"date_column":null,"buckets":2,"counts":[0,0],"digests":["0000000000000000","0000000000000000"]}', columns);
SELECT is(refusal('reconcile', mass()), 'none', 'as many rows as are allowed');
INSERT INTO softmobile.central_projection VALUES ('b1', 'mass', 'one more', 1, now(), 10, false, false, '{}');
SELECT is(refusal('reconcile', mass()), 'SM413: too many rows are in buckets that differ', 'one more');
DELETE FROM softmobile.central_projection WHERE entity_type = 'mass' AND entity_id <> '1';
UPDATE softmobile.central_projection SET row = jsonb_build_object('n', repeat('x', 16777217)) WHERE entity_type = 'mass';
SELECT is(refusal('reconcile', mass()), 'SM413: too many rows are in buckets that differ', 'too many bytes');
SELECT is(refusal('reconcile', mass((SELECT json_agg('c' || n)::text FROM generate_series(1, 50) n))), 'none', 'as many columns as are allowed');
SELECT is(refusal('reconcile', mass((SELECT json_agg('c' || n)::text FROM generate_series(1, 51) n))), 'SM413: at most 50 columns are compared', 'one more');

SELECT matches(refusal('reconcile', (asked(2) || patch)::text), '^SM422: the question ' || why || '.*', left(patch::text, 60)) FROM (VALUES
	('{"entity_type":null}'::jsonb, 'cannot be answered: entity_type'),
	('{"columns":null}', 'cannot be answered: columns must'), ('{"columns":[["a"],["b"]]}', 'cannot be answered: columns must'), ('{"columns":[null]}', 'cannot be answered: columns must'),
	('{"columns":{}}', 'cannot be understood: '), ('{"columns":7}', 'cannot be understood: '),
	('{"columns":["a","b","a"]}', 'cannot be answered: a column stands twice'),
	('{"columns":[[[[[[["a"]]]]]]]}', 'cannot be understood: number of array dimensions'),
	('{"from":null}', 'cannot be answered: from must'), ('{"to":null}', 'cannot be answered: from must'),
	('{"from":"2026-01-31","to":"2026-01-01"}', 'cannot be answered: from must be a date, and to the same or a later one'),
	('{"from":"today"}', 'cannot be answered: from and to must be dates'), ('{"to":"01/02/2026"}', 'cannot be answered: from and to must be dates'),
	('{"from":"2026-02-30"}', 'cannot be understood: date/time field value out of range'), ('{"from":"soon"}', 'cannot be understood: invalid input syntax for type date'), ('{"from":20260101}', 'cannot be answered: from and to must be dates'),
	('{"buckets":0}', 'cannot be answered: buckets'), ('{"buckets":4097}', 'cannot be answered: buckets'), ('{"buckets":null}', 'cannot be answered: buckets'), ('{"buckets":"many"}', 'cannot be understood: invalid input syntax for type integer'),
	('{"counts":[0]}', 'cannot be answered: counts and digests must be arrays'), ('{"counts":[]}', 'cannot be answered: counts and digests must be arrays'), ('{"counts":null}', 'cannot be answered: counts and digests must be arrays'),
	('{"counts":[[0,0]]}', 'cannot be answered: counts and digests must be arrays'), ('{"counts":[0,null]}', 'cannot be answered: counts and digests must not hold null'),
	('{"counts":[0,99999999999999999999]}', 'cannot be understood: value "99999999999999999999" is out of range'), ('{"counts":[0,"x"]}', 'cannot be understood: invalid input syntax for type bigint'),
	('{"digests":["0000000000000000"]}', 'cannot be answered: counts and digests must be arrays'), ('{"digests":["0000000000000000",null]}', 'cannot be answered: counts and digests must not'),
	('{"digests":["0000000000000000","000000000000000G"]}', 'cannot be answered: digests must be 16'), ('{"digests":["0000000000000000","0"]}', 'cannot be answered: digests must be 16')) AS t (patch, why);
SELECT is(refusal('reconcile', asked(4096)::text || repeat(' ', 1048576)), 'SM413: the question has more than 1048576 bytes', 'a question that is too long');
UPDATE softmobile.central_branch SET active = false WHERE branch_id = 'b1';
SELECT is(left(refusal('reconcile', asked()::text), 5), 'SM403', 'a branch that is not active may not ask');
ROLLBACK TO sales;

/* Reference data. */
CREATE FUNCTION reference(name text DEFAULT NULL, branch text DEFAULT 'b1', holder text DEFAULT 'both') RETURNS text
LANGUAGE sql RETURN softmobile.central_reference((SELECT hash FROM tok WHERE tok.name = holder), name, branch);
CREATE FUNCTION no_reference(name text, branch text DEFAULT 'b1', holder text DEFAULT 'both') RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	RETURN reference(name, branch, holder);
EXCEPTION WHEN OTHERS THEN
	RETURN SQLSTATE || ': ' || SQLERRM;
END $$;
SELECT is(reference()::jsonb, '{"resources":[]}', 'nothing is offered');
SELECT lives_ok($$SELECT softmobile.central_set_reference('catalogue', E'{ "sku" : "Ñ-1",\n "price":10.50}')$$, 'headquarters offers a catalogue');
SELECT is(reference('catalogue'), E'{ "sku" : "Ñ-1",\n "price":10.50}', 'which is fetched byte for byte');
SELECT is(reference()::jsonb #- '{resources,0,updated_at}', jsonb_build_object('resources', jsonb_build_array(jsonb_build_object('name', 'catalogue', 'bytes', 33,
	'digest', encode(sha256(convert_to(reference('catalogue'), 'UTF8')), 'hex')))), 'the list has its size and digest');
SELECT is((reference()::jsonb #>> '{resources,0,updated_at}')::timestamptz, now(), 'and since when it is so');
SELECT lives_ok($$SELECT softmobile.central_set_reference(name => 'catalogue', content => '[1]', branch => 'Ñuñoa 2')$$, 'one branch gets another');
SELECT lives_ok($$SELECT softmobile.central_set_reference('customers', '[]')$$, 'and there are customers');
SELECT is(reference('catalogue', 'Ñuñoa 2') || (reference(NULL, 'Ñuñoa 2')::jsonb #>> '{resources,0,bytes}'), '[1]3', 'its own goes before that of all');
SELECT is(reference('catalogue'), E'{ "sku" : "Ñ-1",\n "price":10.50}', 'the others keep theirs');
SELECT is((SELECT string_agg(r ->> 'name', ' ') FROM jsonb_array_elements(reference()::jsonb -> 'resources') r), 'catalogue customers', 'each name is listed once');
SELECT lives_ok($$SELECT softmobile.central_set_reference('catalogue', '{"new":1}')$$, 'a new one');
SELECT is(reference('catalogue'), '{"new":1}', 'replaces the old one');
SELECT lives_ok($$SELECT softmobile.central_set_reference('catalogue', NULL, 'Ñuñoa 2')$$, 'one is taken back');
SELECT is(reference('catalogue', 'Ñuñoa 2'), '{"new":1}', 'and that of all is there again');
SELECT throws_ok($$SELECT softmobile.central_set_reference('catalogue', NULL, 'Ñuñoa 2')$$, '42704', NULL, 'it cannot be taken back twice');
SELECT is((SELECT array_agg((details ->> 'name') || coalesce(' ' || branch_id, '') || coalesce(' ' || (details ->> 'bytes'), '') ORDER BY id) FROM softmobile.central_audit WHERE action = 'set_reference'),
	'{catalogue 33,catalogue Ñuñoa 2 3,customers 2,catalogue 9,catalogue Ñuñoa 2}', 'all of which is audited');
SELECT throws_ok(format('SELECT softmobile.central_set_reference(%L, ''1'')', n), '22023', NULL, 'name ' || left(n, 20)) FROM unnest(ARRAY['', 'a b', 'a/b', 'ñ', '..', repeat('a', 64), E'a\n']) AS n;
SELECT throws_ok($$SELECT softmobile.central_set_reference(NULL, '1')$$, '22023', NULL, 'no name');
SELECT lives_ok(format('SELECT softmobile.central_set_reference(%L, ''1'')', repeat('Z', 63)), 'the longest name');
SELECT throws_ok($$SELECT softmobile.central_set_reference('x', '1', 'nowhere')$$, '42704', NULL, 'a branch that there is not');
SELECT throws_ok($$SELECT softmobile.central_set_reference('x', to_json(repeat('x', 67108864)))$$, '54000', NULL, 'too large');
SELECT is(no_reference('none'), 'SM404: there is no reference data "none"', 'a name that there is not');
SELECT is(no_reference(repeat('x', 100000)), 'SM404: there is no reference data "' || repeat('x', 100) || '"', 'an endless one');
SELECT is(no_reference(n, 'b2'), 'SM403: this token may not speak for branch "b2"', 'another''s branch') FROM unnest(ARRAY['catalogue', NULL]) AS n;
SELECT is(no_reference(n, NULL), 'SM422: the question names no branch', 'no branch') FROM unnest(ARRAY['catalogue', NULL]) AS n;
SELECT is(left(no_reference(n, 'b1', 'revoked'), 5), 'SM401', 'a revoked token') FROM unnest(ARRAY['catalogue', NULL]) AS n;
UPDATE softmobile.central_branch SET active = false WHERE branch_id = 'b1';
SELECT is(left(no_reference('catalogue'), 5), 'SM403', 'a branch that is not active');

/* Rights. */
CREATE ROLE sm_test_questions;
SELECT softmobile.grant_central('sm_test_questions') \g /dev/null
SET ROLE sm_test_questions;
SELECT throws_ok($$SELECT softmobile.central_verify('{}', '\x00')$$, 'SM401', NULL, 'the gateway''s role may verify');
SELECT throws_ok($$SELECT softmobile.central_reconcile('{}', '\x00')$$, 'SM401', NULL, 'and reconcile');
SELECT throws_ok($$SELECT softmobile.central_reference('\x00', NULL, 'b1')$$, 'SM401', NULL, 'and fetch reference data');
SELECT throws_ok($$SELECT softmobile.central_set_reference('x', '1')$$, '42501', NULL, 'but not offer any');
SELECT throws_ok('SELECT FROM softmobile.central_reference_data', '42501', NULL, 'nor read what is another''s');
RESET ROLE;

SELECT * FROM finish();
ROLLBACK;
