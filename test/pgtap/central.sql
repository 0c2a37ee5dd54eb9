-- Headquarters: central_receive() and what it keeps.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();

CREATE TABLE tok (name text PRIMARY KEY, hash bytea);
INSERT INTO tok VALUES
	('b1', sha256(convert_to(softmobile.central_create_token('{b1}', 'server 1'), 'UTF8'))),
	('b1 new', sha256(convert_to(softmobile.central_create_token('{b1}', 'server 1, new'), 'UTF8'))),
	('both', sha256(convert_to(softmobile.central_create_token('{b1,"Ñuñoa 2"}', 'server of two'), 'UTF8')));

-- An event; attributes given in patch replace or (null) remove.
CREATE FUNCTION ev(seq bigint, op text, entity text, new json, old json DEFAULT NULL, patch jsonb DEFAULT '{}', id uuid DEFAULT gen_random_uuid()) RETURNS json
LANGUAGE sql RETURN (jsonb_strip_nulls(jsonb_build_object('specversion', '1.0', 'id', id, 'source', '/branches/b1', 'type', 'softmobile.item.' || op,
		'subject', entity, 'time', '2025-11-24T08:00:00.5Z', 'datacontenttype', 'application/json', 'sequence', seq::text, 'lane', 'high',
		'epoch', '00000000-0000-4000-8000-000000000001', 'epochno', '10', 'reason', 'Venta en tienda', 'actor', 'pos') || patch)
	|| CASE WHEN patch ? 'data' THEN '{}' ELSE jsonb_build_object('data', jsonb_strip_nulls(jsonb_build_object('new', new, 'old', old))) END)::json;
CREATE FUNCTION post(VARIADIC events json[]) RETURNS json
LANGUAGE sql RETURN softmobile.central_receive(array_to_json(events)::text, (SELECT hash FROM tok WHERE name = 'both'))::json;
CREATE FUNCTION held(entity text, branch text DEFAULT 'b1') RETURNS jsonb
LANGUAGE sql RETURN (SELECT row FROM softmobile.central_projection WHERE branch_id = branch AND entity_type = 'item' AND entity_id = entity);
CREATE FUNCTION effect(u uuid) RETURNS text LANGUAGE sql RETURN (SELECT effect FROM softmobile.central_inbox WHERE id = u);
-- n-th well-known id
CREATE FUNCTION u(n int) RETURNS uuid LANGUAGE sql RETURN ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid;

/* A batch, and the same again. */
SELECT is(post(VARIADIC '{}')::jsonb, '{"accepted":0,"duplicates":0,"results":[]}', 'an empty batch is settled');
SELECT is(post(ev(1, 'insert', 'A', '{"id":"A","n":1}', id => u(1)), ev(2, 'update', 'A', '{"id":"A","n":2}', '{"n":1}', id => u(2)))::jsonb,
	'{"accepted":2,"duplicates":0,"results":[]}', 'two events are accepted');
SELECT is(held('A'), '{"id":"A","n":2}', 'the projection holds the latest row');
SELECT is(post(ev(1, 'insert', 'A', '{"id":"A","n":1}', id => u(1)), ev(2, 'update', 'A', '{"id":"A","n":2}', '{"n":1}', id => u(2)))::jsonb,
	'{"accepted":0,"duplicates":2,"results":[]}', 'a replay has no second effect');
SELECT is(post(ev(2, 'update', 'A', '{"id":"A","n":2}', '{"n":1}', id => u(2)), ev(3, 'update', 'A', '{"id":"A","n":3}', '{"n":2}', id => u(3)), ev(3, 'update', 'A', '{"id":"A","n":3}', '{"n":2}', id => u(3)))::jsonb,
	'{"accepted":1,"duplicates":2,"results":[]}', 'a batch that overlaps, and holds an event twice');
SELECT is(held('A'), '{"id":"A","n":3}', 'its new event took effect');
SELECT is((SELECT count(*)::int FROM softmobile.central_inbox), 3, 'the inbox holds each event once');
SELECT is((SELECT (data::text, actor, reason, lane, seq)::text FROM softmobile.central_inbox WHERE id = u(1)),
	((ev(1, 'insert', 'A', '{"id":"A","n":1}', id => u(1)) -> 'data')::text, 'pos', 'Venta en tienda', 'high', 1)::text, 'with its data byte for byte');
SELECT is((post(ev(1, 'insert', 'A', '{"id":"A","n":77}', id => u(1))) #>> '{results,0,status}'), 'rejected', 'an id that comes again with other content is rejected');
SELECT is(post(ev(4, 'delete', 'A', NULL, '{"id":"A","n":3}'))::jsonb ->> 'accepted', '1', 'a delete');
SELECT is((SELECT deleted FROM softmobile.central_projection WHERE entity_id = 'A'), true, 'marks the row deleted');
SELECT is(post(ev(5, 'insert', 'A', '{"id":"A","n":9}'))::jsonb ->> 'accepted', '1', 'and it can be inserted again');
SELECT is(post(ev(6, 'update', 'never seen', '{"n":2}', '{"n":1}'))::jsonb ->> 'accepted', '1', 'an update of an entity never seen is accepted');

/* Order of arrival. */
SELECT is(post(ev(7, 'insert', 'B', '{"n":1}'))::jsonb ->> 'accepted', '1', 'out of order: first');
SELECT is(post(ev(9, 'update', 'B', '{"n":3}', '{"n":2}', id => u(9)))::jsonb, '{"accepted":1,"duplicates":0,"results":[]}', 'the third before the second is no conflict: what is missing explains the difference');
SELECT is(post(ev(8, 'update', 'B', '{"n":2}', '{"n":1}', id => u(8)))::jsonb, '{"accepted":1,"duplicates":0,"results":[]}', 'the second arrives');
SELECT is(held('B'), '{"n":3}', 'and does not overwrite the third');
SELECT is(effect(u(8)), 'older', 'as its effect says');
SELECT is(post(ev(11, 'update', 'B', '{"n":5}', '{"n":4}'), ev(10, 'update', 'B', '{"n":4}', '{"n":3}'))::jsonb, '{"accepted":2,"duplicates":0,"results":[]}', 'a batch in the wrong order');
SELECT is(held('B'), '{"n":5}', 'is applied in the right one');
SELECT is((SELECT received FROM softmobile.central_lanes WHERE branch_id = 'b1'), '{[1,12)}', 'the numbers received are one range');
SELECT is(post(ev(15, 'insert', 'C', '{"n":1}'), ev(13, 'insert', 'D', '{"n":1}'), ev(20, 'insert', 'E', '{"n":1}'))::jsonb ->> 'accepted', '3', 'numbers with holes');
SELECT is((SELECT (received, missing)::text FROM softmobile.central_lanes WHERE branch_id = 'b1'), ('{[1,12),[13,14),[15,16),[20,21)}'::int8multirange, '{[12,13),[14,15),[16,20)}'::int8multirange)::text, 'are kept with them');
SELECT is(post(ev(14, 'insert', 'F', '{"n":1}'), ev(12, 'insert', 'G', '{"n":1}'))::jsonb ->> 'accepted', '2', 'late numbers');
SELECT is((SELECT received FROM softmobile.central_lanes WHERE branch_id = 'b1'), '{[1,16),[20,21)}', 'close the holes');
SELECT lives_ok($$SELECT softmobile.central_add_numbers('b1', '00000000-0000-4000-8000-000000000001', 'high', true, '{[16,20)}')$$, 'the rest is declared void');
SELECT is((SELECT missing FROM softmobile.central_lanes WHERE branch_id = 'b1'), '{}', 'and nothing is missing');
SELECT is((SELECT count(*)::int FROM softmobile.central_fork), 0, 'none of it was a fork');

-- central_add_numbers() against multirange union
CREATE TABLE drawn AS SELECT n, int8multirange(int8range(a, a + (random() * 8)::int, '[]')) AS r FROM (SELECT n, (random() * 400)::int + 1 AS a FROM generate_series(1, 300) n) x;
SELECT softmobile.central_add_numbers('b1', u(0), 'low', false, r) FROM drawn ORDER BY n \g /dev/null
SELECT is((SELECT range_agg(int8range(first_seq, last_seq, '[]')) FROM softmobile.central_span WHERE epoch = u(0)), (SELECT range_agg(r) FROM (SELECT unnest(r) AS r FROM drawn) x), 'numbers added in any order are the union');
SELECT is((SELECT count(*) FROM softmobile.central_span WHERE epoch = u(0)), (SELECT count(*) FROM unnest((SELECT range_agg(r) FROM (SELECT unnest(r) AS r FROM drawn) x))), 'in as few ranges as can be');
DELETE FROM softmobile.central_span WHERE epoch = u(0);

/* Conflicts. */
SELECT is(post(ev(21, 'insert', 'P', '{"id":"P","price":10,"name":"phone"}'))::jsonb ->> 'accepted', '1', 'an item');
SELECT is(post(ev(22, 'update', 'P', '{"id":"P","price":30,"name":"phone"}', '{"price":20}', id => u(22)))::jsonb,
	jsonb_build_object('accepted', 0, 'duplicates', 0, 'results', jsonb_build_array(jsonb_build_object('id', u(22), 'status', 'conflict', 'detail', 'headquarters holds other values of price',
		'current', '{"id":"P","price":10,"name":"phone"}'::jsonb))), 'old values that central does not hold, and nothing missing: a conflict, with central''s row');
SELECT is((held('P') ->> 'price', effect(u(22)))::text, ('10', 'conflict')::text, 'central''s row stays, the event is kept');
SELECT is(post(ev(22, 'update', 'P', '{"id":"P","price":30,"name":"phone"}', '{"price":20}', id => u(22)))::jsonb #>> '{results,0,status}', 'conflict', 'a replay is answered the same');
SELECT is((SELECT (entity_id, branch_old, branch_new ->> 'price', central_row ->> 'price', detail)::text FROM softmobile.central_conflicts), ('P', '{"price":20}'::jsonb, '30', '10', 'headquarters holds other values of price')::text, 'headquarters sees it side by side');
SELECT is(post(ev(22, 'update', 'P', '{"id":"P","price":30,"name":"phone"}', '{"price":20}', '{"resolution":"local"}', id => u(22)))::jsonb, '{"accepted":1,"duplicates":0,"results":[]}', 'resolved as local it is accepted');
SELECT is((held('P') ->> 'price', effect(u(22)), (SELECT count(*)::int FROM softmobile.central_conflicts))::text, ('30', 'applied', 0)::text, 'and applied, the conflict closed');
SELECT is(post(ev(22, 'update', 'P', '{"id":"P","price":30,"name":"phone"}', '{"price":20}', '{"resolution":"local"}', id => u(22)))::jsonb, '{"accepted":0,"duplicates":1,"results":[]}', 'once');

SELECT throws_ok($$SELECT softmobile.central_change('b1', 'item', 'P', '{"id":"P","price":40,"name":"phone"}', 'abc')$$, '23514', NULL, 'headquarters needs a reason too');
SELECT throws_ok($$SELECT softmobile.central_change('nowhere', 'item', 'P', '{}', 'price list 12')$$, '42704', NULL, 'and a branch');
SELECT throws_ok($$SELECT softmobile.central_change('b1', 'item', 'P', '[]', 'price list 12')$$, '22023', NULL, 'and a row');
SELECT lives_ok($$SELECT softmobile.central_change('b1', 'item', 'P', '{"id":"P","price":40,"name":"phone"}', 'price list 12')$$, 'headquarters changes a price');
SELECT is((SELECT (branch_id, reason, details -> 'old' ->> 'price', details -> 'new' ->> 'price')::text FROM softmobile.central_audit WHERE action = 'change'), ('b1', 'price list 12', '30', '40')::text, 'which is audited');
SELECT is(post(ev(23, 'update', 'P', '{"id":"P","price":30,"name":"smartphone"}', '{"name":"phone"}'))::jsonb ->> 'accepted', '1', 'the branch changes another column');
SELECT is(held('P'), '{"id":"P","price":40,"name":"smartphone"}', 'both changes stand');
SELECT is(post(ev(24, 'update', 'P', '{"id":"P","price":31,"name":"smartphone"}', '{"price":30}', id => u(24)), ev(25, 'update', 'P', '{"id":"P","price":31,"name":"tablet"}', '{"name":"smartphone"}', id => u(25)), ev(26, 'insert', 'Q', '{"n":1}'))::jsonb #> '{results,1}',
	jsonb_build_object('id', u(25), 'status', 'conflict', 'detail', 'an earlier event of the same entity is in conflict', 'current', '{"id":"P","price":40,"name":"smartphone"}'::jsonb),
	'the same column is a conflict, and what follows it of the same entity waits');
SELECT is(held('Q'), '{"n":1}', 'other entities go on');
SELECT is(post(ev(24, 'update', 'P', '{"id":"P","price":31,"name":"smartphone"}', '{"price":30}', '{"resolution":"central"}', u(24)))::jsonb, '{"accepted":1,"duplicates":0,"results":[]}', 'resolved for central');
SELECT is((effect(u(24)), held('P') ->> 'price')::text, ('overruled', '40')::text, 'central''s row stays');
SELECT is(post(ev(25, 'update', 'P', '{"id":"P","price":31,"name":"tablet"}', '{"name":"smartphone"}', id => u(25)))::jsonb, '{"accepted":1,"duplicates":0,"results":[]}', 'what waited is sent again');
SELECT is(held('P'), '{"id":"P","price":40,"name":"tablet"}', 'and merged');
SELECT is(post(ev(27, 'update', 'P', '{"id":"P","price":40,"name":"tablet"}', '{"price":31}'))::jsonb ->> 'accepted', '1', 'the branch takes over central''s price: no conflict');
SELECT is((SELECT changed_here FROM softmobile.central_projection WHERE entity_id = 'P'), false, 'and both hold the same again');
SELECT lives_ok($$SELECT softmobile.central_change('b1', 'item', 'P', NULL, 'discontinued')$$, 'headquarters deletes it');
SELECT is(post(ev(28, 'update', 'P', '{"id":"P","price":41,"name":"tablet"}', '{"price":40}'))::jsonb #> '{results,0,current}', 'null', 'an update of it is a conflict, with no row');
SELECT is(post(ev(29, 'delete', 'P', NULL, '{"id":"P","price":41,"name":"tablet"}'))::jsonb ->> 'accepted', '1', 'a delete of it is none');

SELECT is(post(ev(30, 'insert', 'S', '{"folio":"S","total":5}'))::jsonb ->> 'accepted', '1', 'a sale');
SELECT is(post(ev(31, 'insert', 'S', '{"folio":"S","total":7}', id => u(31)))::jsonb #>> '{results,0,detail}', 'headquarters holds another row of this identity, with other values of total', 'a second sale of this folio does not replace the first');
SELECT is(post(ev(1, 'insert', 'S', '{"folio":"S","total":7}', patch => '{"epoch":"00000000-0000-4000-8000-000000000002","epochno":"11"}'))::jsonb #>> '{results,0,status}', 'conflict', 'nor does one of a later epoch');
SELECT is(post(ev(2, 'insert', 'S', '{"total":5,"folio":"S"}', patch => '{"epoch":"00000000-0000-4000-8000-000000000002","epochno":"11"}'))::jsonb ->> 'accepted', '1', 'the same sale again is none');
SELECT is(post(ev(3, 'update', 'S', '{"folio":"S","total":6}', '{"total":5}', '{"epoch":"00000000-0000-4000-8000-000000000002","epochno":"11"}'))::jsonb ->> 'accepted', '1', 'a later epoch goes on');
SELECT is(post(ev(32, 'update', 'S', '{"folio":"S","total":99}', '{"total":5}', id => u(32)))::jsonb ->> 'accepted', '1', 'what comes late from the earlier epoch');
SELECT is((effect(u(32)), held('S') ->> 'total')::text, ('older', '6')::text, 'is older, whatever its number');

-- time zones of the sessions that wrote, columns added at the branch
SELECT is(post(ev(33, 'insert', 'T', '{"at":"2025-11-24T08:00:00+00:00","n":1}'), ev(34, 'update', 'T', '{"at":"2025-11-24T03:05:00-06:00","n":1}', '{"at":"2025-11-24T02:00:00-06:00"}'))::jsonb ->> 'accepted', '2', 'the same moment written in two time zones is no difference');
SELECT is(post(ev(35, 'update', 'T', '{"at":"2025-11-24T03:05:00-06:00","n":1,"x":2}', '{"x":1}'))::jsonb ->> 'accepted', '1', 'nor is a column that central has not seen');
SELECT is(post(ev(36, 'update', 'T', '{"at":"2025-13-24T03:05:00-06:00","n":1,"x":2}', '{"at":"2025-11-24T03:06:00-06:00"}'))::jsonb #>> '{results,0,status}', 'conflict', 'another moment is');

/* Snapshots. */
SELECT is(post(ev(1, 'insert', 'N1', '{"n":1}', patch => '{"lane":"low","snapshot":"true"}'), ev(2, 'insert', 'T', '{"n":0}', patch => '{"lane":"low","snapshot":"true"}'))::jsonb ->> 'accepted', '2', 'snapshot events');
SELECT is((held('N1'), held('T') ->> 'n')::text, ('{"n":1}'::jsonb, '1')::text, 'bring what is new and overwrite nothing');
SELECT is(post(ev(37, 'update', 'N1', '{"n":3}', '{"n":2}'))::jsonb ->> 'accepted', '1', 'the first change after a snapshot is no conflict');

/* Forks. */
SET LOCAL client_min_messages = error;
SELECT is(post(ev(30, 'insert', 'clone', '{"n":1}', id => u(300)))::jsonb ->> 'accepted', '1', 'a number used twice is accepted');
SELECT is((SELECT (seq, second_id, effect(first_id))::text FROM softmobile.central_forks), (30, u(300), 'applied')::text, 'and reported as a fork');
SELECT is(post(ev(40, 'insert', 'x1', '{"n":1}'), ev(40, 'insert', 'x2', '{"n":1}'))::jsonb ->> 'accepted', '2', 'also within a batch');
SELECT is((SELECT count(*)::int FROM softmobile.central_forks), 2, 'both are there');
SELECT is(post(ev(30, 'insert', 'clone', '{"n":1}', id => u(300)))::jsonb ->> 'duplicates', '1', 'a replay of it is a duplicate');
SELECT is((SELECT count(*)::int FROM softmobile.central_fork), 2, 'and no fork');

RESET client_min_messages;

/* Single events that are refused. */
CREATE FUNCTION refused(patch jsonb, op text DEFAULT 'insert') RETURNS text LANGUAGE plpgsql AS $$
DECLARE answer json := post(ev(50, 'insert', 'good', '{"n":1}', id => u(500)), ev(51, op, 'bad', '{"n":1}', patch => patch));
BEGIN
	RETURN concat_ws(': ', answer #>> '{results,0,status}', answer #>> '{results,0,detail}');
END $$;
SELECT is(refused('{"lane":"urgent"}'), 'rejected: lane must be high, normal or low');
SELECT is(held('good'), '{"n":1}', 'the others of the batch are stored');
SELECT is(refused('{"subject":null}'), 'rejected: subject must be the entity''s id');
SELECT is(refused('{"sequence":"0"}'), 'rejected: sequence must be a number from 1 to 9223372036854775806');
SELECT is(refused('{"sequence":"-1"}'), 'rejected: sequence must be a number from 1 to 9223372036854775806');
SELECT is(refused('{"sequence":"99999999999999999999"}'), 'rejected: sequence must be a number from 1 to 9223372036854775806');
SELECT is(refused('{"sequence":"9223372036854775807"}'), 'rejected: sequence must be a number from 1 to 9223372036854775806', 'behind which there must be room for another');
SELECT is(refused('{"sequence":null}'), 'rejected: sequence must be a number from 1 to 9223372036854775806');
SELECT is(refused('{"source":"/shops/b1"}'), 'rejected: source must be /branches/<branch>');
SELECT is(refused('{"source":"/branches/"}'), 'rejected: source must be /branches/<branch>');
SELECT like(refused('{"source":"/branches/%FF"}'), 'rejected: invalid byte sequence%');
SELECT is(refused('{"id":"17"}'), 'rejected: id must be a UUID');
SELECT is(refused('{"specversion":"0.3"}'), 'rejected: specversion must be 1.0');
SELECT is(refused('{"epoch":"x"}'), 'rejected: epoch must be a UUID');
SELECT is(refused('{"epochno":"x"}'), 'rejected: epochno must be a positive integer');
SELECT is(refused('{"time":"yesterday"}'), 'rejected: time must be an RFC 3339 time');
SELECT is(refused('{"time":"2025-13-01T00:00:00Z"}'), 'rejected: time must be an RFC 3339 time');
SELECT is(refused('{"type":"softmobile.item.upsert"}'), 'rejected: type must be softmobile.<entity type>.<insert, update or delete>');
SELECT is(refused('{"type":"other.item.insert"}'), 'rejected: type must be softmobile.<entity type>.<insert, update or delete>');
SELECT is(refused('{"data":[1]}'), 'rejected: data must be an object');
SELECT is(refused('{"data":{"old":{}}}'), 'rejected: data.new must be the row');
SELECT is(refused('{"data":{"new":7}}'), 'rejected: data.new must be the row');
SELECT is(refused('{"data":{"new":{}}}', 'update'), 'rejected: data.old must be the values before the change');
SELECT is(refused('{"data":{"new":{}}}', 'delete'), 'rejected: data.old must be the values before the change');
SELECT is(refused('{"resolution":"mine"}'), 'rejected: resolution must be local or central');
SELECT is(refused(jsonb_build_object('type', 'softmobile.' || repeat('t', 101) || '.insert')), 'rejected: the entity type must be at most 100 bytes long');
SELECT is(refused(jsonb_build_object('subject', (SELECT string_agg(md5(n::text), '') FROM generate_series(1, 63) n))), 'rejected: subject must be at most 2000 bytes long');
SELECT is((SELECT count(*)::int FROM softmobile.central_inbox WHERE entity_id = 'bad'), 0, 'nothing of them is kept');
SELECT is((SELECT (a ->> 'accepted', a #>> '{results,0,id}', a #>> '{results,0,detail}', a #>> '{results,1,id}')::text
	FROM softmobile.central_receive(replace(json_build_array(ev(53, 'insert', 'bad', '{"n":"@0000"}', id => u(53)), ev(54, 'insert', 'beside', '{"n":"\\u0000 \\ud800 \ud83d\ude00"}'),
			ev(58, 'insert', 'bad', '{"n":"@d800"}', id => u(58)))::text, '@', '\u'),
		(SELECT hash FROM tok WHERE name = 'both')) AS r, json(r) AS a), ('1', u(53), 'unsupported Unicode escape sequence', u(58))::text, 'a zero or half a character spoils its own event only');
SELECT is(held('beside'), '{"n":"\\u0000 \\ud800 😀"}', 'not what only looks like them');

/* Odd contents that are none of central's business. */
SELECT is(post(ev(55, 'insert', E'\'"; DROP TABLE \\ \t☃ 😀', '{"n":"Ñandú 日本 😀 \"\\\u0001"}', id => u(55)))::jsonb ->> 'accepted', '1', 'quotes, backslashes, control characters, any script');
SELECT is((held(E'\'"; DROP TABLE \\ \t☃ 😀'), (SELECT data -> 'new' ->> 'n' FROM softmobile.central_inbox WHERE id = u(55)))::text,
	('{"n":"Ñandú 日本 😀 \"\\\u0001"}'::jsonb, E'Ñandú 日本 😀 "\\\u0001')::text, 'arrive as they are');
SELECT is(post(ev(56, 'insert', repeat('é', 1000), '{"n":1}'), ev(57, 'insert', 'big', json_build_object('n', repeat('ñ', 524288))))::jsonb ->> 'accepted', '2', 'the longest subject, and a row of 1 MB');
SELECT is(octet_length(held('big') ->> 'n'), 1048576, 'is there in full');
SELECT is(post(ev(60, 'insert', 'N1', '{"n":9}', patch => '{"snapshot":"false"}'))::jsonb ->> 'accepted', '1', 'an event whose snapshot is not true');
SELECT is(held('N1'), '{"n":9}', 'is none, and replaces the row');
SELECT is(post(ev(52, 'insert', 'zone', '{"n":1}', patch => '{"time":"2025-11-24T02:00:00-06:00"}', id => u(52)))::jsonb ->> 'accepted', '1', 'a time with an offset is a time');
SELECT is((SELECT event_time FROM softmobile.central_inbox WHERE id = u(52)), '2025-11-24 08:00:00+00', 'the right one');
SELECT is(post(ev(1, 'insert', 'plain', '{"n":1}', patch => '{"source":"/branches/%C3%91u%C3%B1oa%202"}'), ev(2, 'insert', 'plain', '{"n":1}', patch => '{"source":"/branches/Ñuñoa 2"}'))::jsonb ->> 'accepted', '2', 'a branch in percent-encoding');
SELECT is(held('plain', 'Ñuñoa 2'), '{"n":1}', 'is decoded');
-- sinks that know no epoch ordinals: epochs count as they come
SELECT is(post(ev(1, 'insert', 'W', '{"n":1}', patch => jsonb_build_object('source', '/branches/Ñuñoa%202', 'epoch', u(1), 'epochno', NULL)))::jsonb ->> 'accepted', '1', 'without epochno');
SELECT is(post(ev(1, 'insert', 'W', '{"n":1}', patch => jsonb_build_object('source', '/branches/Ñuñoa%202', 'epoch', u(2), 'epochno', NULL)))::jsonb ->> 'accepted', '1', 'a second epoch');
SELECT is((SELECT array_agg(epoch_no ORDER BY epoch) FROM softmobile.central_lanes WHERE branch_id <> 'b1' AND epoch IN (u(1), u(2))), '{11,12}', 'epochs are ordered as they come');

/* Batches that are refused. */
CREATE FUNCTION refusal(body text, holder text DEFAULT 'b1') RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM softmobile.central_receive(body, (SELECT hash FROM tok WHERE name = holder));
	RETURN 'none';
EXCEPTION WHEN OTHERS THEN
	RETURN SQLSTATE;
END $$;
SELECT is(refusal('{"a":1}'), 'SM400', 'no array');
SELECT is(refusal('[{"a":1'), 'SM400', 'cut off');
SELECT is(refusal(NULL), 'SM400', 'no body');
SELECT is(refusal(repeat('[', 100000)), 'SM400', 'nested without end');
SELECT is(refusal('[7]'), 'SM422', 'no object');
SELECT is(refusal('[{"specversion":"1.0"}]'), 'SM422', 'no id');
SELECT is(refusal('[{"id":"1"}]'), 'SM422', 'no specversion');
SELECT is(refusal((SELECT json_agg(ev(n, 'insert', 'many', '{}'))::text FROM generate_series(1, 20001) n)), 'SM413', 'too many events');
SELECT is(refusal('[]', 'nobody'), 'SM401', 'an unknown token');
SELECT is(refusal(json_build_array(ev(60, 'insert', 'f1', '{}'), ev(1, 'insert', 'f2', '{}', patch => '{"source":"/branches/%C3%91u%C3%B1oa%202"}'))::text), 'SM403', 'a branch that is not the token''s');
SELECT is(held('f1'), NULL, 'nothing of that batch is stored');
SELECT is(refusal('[]', 'b1 new'), 'none', 'two tokens of a branch are valid at once');
SELECT is(softmobile.central_revoke_token('server 1'), 1::bigint, 'one is revoked');
SELECT is(refusal('[]'), 'SM401', 'and is not valid any more');
SELECT is(refusal('[]', 'b1 new'), 'none', 'the other one is');
SELECT throws_ok($$SELECT softmobile.central_revoke_token('server 1')$$, '42704', NULL, 'it cannot be revoked twice');
UPDATE softmobile.central_token SET expires_at = now() WHERE label = 'server 1, new';
SELECT is(refusal('[]', 'b1 new'), 'SM401', 'an expired token');
UPDATE softmobile.central_token SET expires_at = NULL WHERE label = 'server 1, new';
UPDATE softmobile.central_branch SET active = false WHERE branch_id = 'b1';
SELECT is(refusal(json_build_array(ev(61, 'insert', 'f1', '{}'))::text, 'b1 new'), 'SM403', 'a branch that is not active');
SELECT is((SELECT count(*)::int FROM softmobile.central_token t, tok WHERE t.token_hash = tok.hash AND octet_length(t.token_hash) = 32), 3, 'tokens are kept as hashes');
SELECT throws_ok($$SELECT softmobile.central_create_token('{}', 'x')$$, '22023', NULL, 'a token needs a branch');
SELECT throws_ok($$SELECT softmobile.central_create_token('{b1}', ' ')$$, '22023', NULL, 'and a label');
SELECT throws_ok($$SELECT softmobile.central_create_token(ARRAY[repeat('b', 101)], 'x')$$, '22023', NULL, 'and branch ids as branches have them');
DELETE FROM softmobile.central_branch WHERE branch_id = 'b1';
SELECT is(refusal(json_build_array(ev(62, 'insert', 'f1', '{}'))::text, 'b1 new'), 'SM403', 'nor is a branch taken that headquarters has removed');
INSERT INTO softmobile.central_branch (branch_id, active) VALUES ('b1', false);

/* Headquarters makes something else of its tables: an event is written as ever, and what a statement does, happens. */
CREATE FUNCTION posted(entity text, n int) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	seq bigint := (SELECT coalesce(max(i.seq), 0) + 1 FROM softmobile.central_inbox i WHERE i.branch_id = 'Ñuñoa 2' AND i.epoch = u(9));
	where_from CONSTANT jsonb := jsonb_build_object('source', '/branches/Ñuñoa%202', 'epoch', u(9));
	answer json;
BEGIN
	answer := post(ev(seq, CASE n WHEN 1 THEN 'insert' ELSE 'update' END, entity, json_build_object('n', n),
		CASE WHEN n > 1 THEN json_build_object('n', n - 1) END, where_from));
	RETURN concat_ws(' ', answer ->> 'accepted', held(entity, 'Ñuñoa 2') ->> 'n', (SELECT count(*) FROM softmobile.central_inbox i WHERE i.branch_id = 'Ñuñoa 2' AND i.entity_id = entity));
EXCEPTION WHEN OTHERS THEN
	RETURN SQLERRM;
END $$;
CREATE TABLE fired (name text, level text, rows int);
CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.fired VALUES (tg_name, tg_level, NULL); RETURN NULL; END $$;
CREATE FUNCTION fire_with_rows() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.fired SELECT tg_name, tg_level, count(*) FROM new_rows; RETURN NULL; END $$;
SELECT is(posted('T', 1), '1 1 1', 'a row');
CREATE TRIGGER of_column AFTER UPDATE OF row ON softmobile.central_projection FOR EACH ROW EXECUTE FUNCTION fire();
SELECT is(posted('T', 2), '1 2 2', 'with a trigger for updates of a column');
CREATE TRIGGER statement AFTER INSERT ON softmobile.central_inbox FOR EACH STATEMENT EXECUTE FUNCTION fire();
CREATE TRIGGER transition AFTER INSERT ON softmobile.central_inbox REFERENCING NEW TABLE AS new_rows FOR EACH ROW EXECUTE FUNCTION fire_with_rows();
SELECT is(posted('T', 3), '1 3 3', '... of a statement, and with a transition table');
SELECT is((SELECT array_agg(concat_ws(' ', name, level, rows) ORDER BY name, level) FROM fired),
	'{"of_column ROW","of_column ROW","statement STATEMENT","transition ROW 1"}', 'they fire');
DROP TRIGGER of_column ON softmobile.central_projection;
DROP TRIGGER statement ON softmobile.central_inbox;
DROP TRIGGER transition ON softmobile.central_inbox;
ALTER TABLE softmobile.central_inbox ADD COLUMN note text DEFAULT 'new';
ALTER TABLE softmobile.central_projection ADD COLUMN marked text GENERATED ALWAYS AS ((row ->> 'n') || '!') STORED;
SELECT is(posted('T', 4), '1 4 4', 'with columns more');
SELECT is((SELECT marked FROM softmobile.central_projection WHERE branch_id = 'Ñuñoa 2' AND entity_id = 'T'), '4!', '... they are filled');
ALTER TABLE softmobile.central_inbox DROP COLUMN note;
ALTER TABLE softmobile.central_projection DROP COLUMN marked;
SELECT is(posted('T', 5), '1 5 5', '... dropped again');
ALTER TABLE softmobile.central_projection ALTER COLUMN changed_at TYPE text;
SELECT is(posted('T', 6), '1 6 6', 'with a column of another type');
ALTER EXTENSION softmobile DROP TABLE softmobile.central_inbox;
ALTER TABLE softmobile.central_inbox RENAME TO central_inbox_before;
CREATE TABLE softmobile.central_inbox (LIKE softmobile.central_inbox_before INCLUDING INDEXES) PARTITION BY LIST (branch_id);
ALTER TABLE softmobile.central_inbox ATTACH PARTITION softmobile.central_inbox_before DEFAULT;
SELECT is(posted('T', 7), '1 7 7', 'partitioned');

/* Rights. */
CREATE ROLE sm_test_gateway;
SELECT throws_ok($$SELECT softmobile.grant_central('sm_test_nobody')$$, '42704', NULL, 'grant_central() needs a role');
SELECT lives_ok($$SELECT softmobile.grant_central('sm_test_gateway')$$, 'grant_central()');
SET ROLE sm_test_gateway;
SELECT throws_ok($$SELECT softmobile.central_receive('[]', '\x00')$$, 'SM401', NULL, 'the gateway''s role may call central_receive()');
SELECT is(softmobile.central_health(), '{"status":"ok"}', 'and central_health()');
SELECT throws_ok($$SELECT softmobile.central_admit('\x00')$$, 'SM401', NULL, 'and central_admit()');
SELECT throws_ok('SELECT FROM softmobile.central_' || x, '42501', NULL, 'but not read ' || x) FROM unnest('{inbox,token,projection,conflicts}'::text[]) AS x;
SELECT throws_ok($$SELECT softmobile.central_create_token('{b1}', 'mine')$$, '42501', NULL, 'nor make tokens');
SELECT throws_ok($$SELECT softmobile.central_change('b1', 'item', 'P', '{}', 'because I can')$$, '42501', NULL, 'nor change rows');
RESET ROLE;
SELECT is((SELECT count(*)::int FROM pg_proc WHERE pronamespace = 'softmobile'::regnamespace AND proname LIKE 'central%' AND has_function_privilege('public', oid, 'EXECUTE')), 0, 'PUBLIC may call nothing of central');
SELECT is((SELECT (open_conflicts, forks, active)::text FROM softmobile.central_status WHERE branch_id = 'b1'),
	((SELECT count(*) FROM softmobile.central_conflicts), 2::bigint, false)::text, 'central_status sums it up');

SELECT * FROM finish();
ROLLBACK;
