// A ROS 2 robot's ears, without ROS: a Fast DDS subscriber that shows the raw bytes of what arrives.
//
// Fast DDS is the default middleware of ROS 2 Humble. The type support below knows no fields: it keeps the serialized payload as it came from
// the wire, representation header included. Loopback only. Usage: fastdds_listener DOMAIN TOPIC TYPE COUNT SECONDS

#include <fastdds/dds/domain/DomainParticipant.hpp>
#include <fastdds/dds/domain/DomainParticipantFactory.hpp>
#include <fastdds/dds/subscriber/DataReader.hpp>
#include <fastdds/dds/subscriber/SampleInfo.hpp>
#include <fastdds/dds/subscriber/Subscriber.hpp>
#include <fastdds/dds/topic/TopicDataType.hpp>
#include <fastdds/dds/topic/TypeSupport.hpp>
#include <fastdds/rtps/transport/UDPv4TransportDescriptor.h>
#include <fastrtps/config.h>
#include <fastrtps/utils/IPLocator.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

using namespace eprosima::fastdds::dds;
namespace rtps = eprosima::fastrtps::rtps;

class RawType : public TopicDataType {
public:
    explicit RawType(const std::string& name) {
        setName(name.c_str());
        m_typeSize = 4096;
        m_isGetKeyDefined = false;
    }
    bool serialize(void*, rtps::SerializedPayload_t*) override { return false; }
    bool deserialize(rtps::SerializedPayload_t* payload, void* data) override {
        auto* bytes = static_cast<std::vector<unsigned char>*>(data);
        bytes->assign(payload->data, payload->data + payload->length);
        return true;
    }
    std::function<uint32_t()> getSerializedSizeProvider(void*) override { return [] { return 0u; }; }
    void* createData() override { return new std::vector<unsigned char>; }
    void deleteData(void* data) override { delete static_cast<std::vector<unsigned char>*>(data); }
    bool getKey(void*, rtps::InstanceHandle_t*, bool) override { return false; }
};

int main(int count, char** arguments) {
    if (count != 6) return 2;
    const int domain = std::atoi(arguments[1]);
    const int wanted = std::atoi(arguments[4]);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(arguments[5]));

    DomainParticipantQos participant_qos;
    participant_qos.transport().use_builtin_transports = false;
    auto transport = std::make_shared<eprosima::fastdds::rtps::UDPv4TransportDescriptor>();
    transport->interfaceWhiteList.push_back("127.0.0.1");
    participant_qos.transport().user_transports.push_back(transport);
    rtps::Locator_t peer;
    rtps::IPLocator::setIPv4(peer, 127, 0, 0, 1);  // no port: those of the first participants of the domain
    participant_qos.wire_protocol().builtin.initialPeersList.push_back(peer);
    participant_qos.wire_protocol().builtin.discovery_config.initial_announcements.count = 40;
    participant_qos.wire_protocol().builtin.discovery_config.initial_announcements.period = {0, 250000000};
    DomainParticipant* participant = DomainParticipantFactory::get_instance()->create_participant(domain, participant_qos);
    if (!participant) return 3;

    TypeSupport type(new RawType(arguments[3]));
    type.register_type(participant);
    Topic* topic = participant->create_topic(arguments[2], arguments[3], TOPIC_QOS_DEFAULT);
    Subscriber* subscriber = participant->create_subscriber(SUBSCRIBER_QOS_DEFAULT);
    DataReaderQos reader_qos;  // as a ROS 2 subscription has by default
    reader_qos.reliability().kind = RELIABLE_RELIABILITY_QOS;
    reader_qos.durability().kind = VOLATILE_DURABILITY_QOS;
    reader_qos.history().kind = KEEP_LAST_HISTORY_QOS;
    reader_qos.history().depth = 10;
    reader_qos.endpoint().history_memory_policy = rtps::PREALLOCATED_WITH_REALLOC_MEMORY_MODE;
    DataReader* reader = topic && subscriber ? subscriber->create_datareader(topic, reader_qos) : nullptr;
    if (!reader) return 4;
    std::printf("fastdds %s listening\n", FASTRTPS_VERSION_STR);
    std::fflush(stdout);

    int taken = 0;
    while (taken < wanted && std::chrono::steady_clock::now() < end) {
        std::vector<unsigned char> bytes;
        SampleInfo info;
        if (reader->take_next_sample(&bytes, &info) != ReturnCode_t::RETCODE_OK) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            continue;
        }
        if (!info.valid_data) continue;
        std::printf("%zu ", bytes.size());
        for (unsigned char byte : bytes) std::printf("%02x", byte);
        std::printf("\n");
        std::fflush(stdout);
        ++taken;
    }
    participant->delete_contained_entities();
    DomainParticipantFactory::get_instance()->delete_participant(participant);
    return taken >= wanted ? 0 : 1;
}
